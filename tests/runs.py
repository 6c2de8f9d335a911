"Tiny runs in processes of their own."
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from fishnet_nb.cli import main
from fishnet_nb.training import read_metrics

# a very thin FishNet on a few synthetic shapes
TINY = ['--data.data=shapes', '--data.batch_size=32', '--model.arch_args.widths=[8, 16]', '--model.arch_args.tail=[1, 1]',
        '--trainer.accelerator=cpu', '--trainer.precision=32-true', '--trainer.limit_val_batches=2', '--trainer.enable_progress_bar=false', '--data.num_workers=0']
FIGURES = ('epoch', 'lr', 'train_loss', 'train_f1', 'val_loss', 'val_f1', 'val_top1_error', 'val_top5_error')


_server = multiprocessing.get_context('forkserver')
_server.set_forkserver_preload(['fishnet_nb.testing'])


def _run(folder: Path, logs: Path, args: list[str]) -> None:
    for stream, name in (1, 'out'), (2, 'err'): os.dup2(os.open(logs/name, os.O_WRONLY | os.O_CREAT), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background, it is ignored
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.exit(main(['fit', 'quick', *args]))


class Run:
    """`fishnet-nb fit quick` in a process forked from one that has imported the library, since importing it takes longer than a tiny run.
    It has what is needed here of Popen."""
    def __init__(self, folder: Path, *args: str):
        self.logs = tempfile.TemporaryDirectory()
        self.process = _server.Process(target=_run, args=(folder, Path(self.logs.name), args))
        self.process.start()

    def poll(self) -> int | None: return self.process.exitcode

    def send_signal(self, number: int) -> None: os.kill(self.process.pid, number)

    def kill(self) -> None: self.process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.process.join(timeout)
        if self.poll() is None: raise subprocess.TimeoutExpired('fishnet-nb fit quick', timeout)
        self.returncode = self.poll()
        return tuple((Path(self.logs.name)/name).read_text() for name in ('out', 'err'))


def start(folder: Path, *args: str, **more: object) -> subprocess.Popen:
    "The same in a whole new process, which several ranks need; `more` goes to Popen."
    env = {**{key: value for key, value in os.environ.items() if key != 'FISHNET_DEBUG'}, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), *os.environ.get('PYTHONPATH', '').split(os.pathsep)])}
    return subprocess.Popen([sys.executable, '-m', 'fishnet_nb', 'fit', 'quick', *args], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def finish(process: Run | subprocess.Popen, timeout: float = 240) -> str:
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, out + err
    return out


class FirstRankFails(Callback):
    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero: raise OSError('the cable was pulled')


class WaitsInItsTest(Callback):
    "Until there is a file that lets it go on; says before that it has come so far."
    def on_test_batch_start(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        Path(f'testing-{trainer.global_rank}').touch()
        while not Path('go-on').exists(): time.sleep(.01)


def figures(folder: Path) -> list[tuple]: return [tuple(row[key] for key in FIGURES) for row in read_metrics(folder/'metrics.csv')]


def wait_for_epochs(process: Run | subprocess.Popen, folder: Path, n: int) -> None:
    "Until `n` epochs are written, or the process has ended."
    wait_until(lambda: process.poll() is not None or len(read_metrics(folder/'metrics.csv')) >= n, .05)


def wait_until(happens: Callable[[], bool], interval_s: float = .0005, timeout_s: float = 240) -> None:
    "Fails if it takes too long."
    start = time.monotonic()
    while not happens():
        assert time.monotonic() - start < timeout_s, f'nothing in {timeout_s} s'
        time.sleep(interval_s)
