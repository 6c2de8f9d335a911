"Tiny runs in processes of their own."
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fishnet_nb.training import read_metrics

# a very thin FishNet on a few synthetic shapes
TINY = ['--data.data=shapes', '--data.batch_size=32', '--model.arch_args.widths=[8, 16]', '--model.arch_args.tail=[1, 1]',
        '--trainer.precision=32-true', '--trainer.limit_val_batches=2', '--trainer.enable_progress_bar=false']
FIGURES = ('epoch', 'lr', 'train_loss', 'train_f1', 'val_loss', 'val_f1', 'val_top1_error', 'val_top5_error')


def start(folder: Path, *args: str, program: Sequence[str] = ('-m', 'fishnet_nb'), **more: object) -> subprocess.Popen:
    "`fishnet-nb fit quick` with a tiny network in a process of its own; `more` goes to Popen."
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, *program, 'fit', 'quick', *args], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **more)


def finish(process: subprocess.Popen, timeout: float = 240) -> str:
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, out + err
    return out


def figures(folder: Path) -> list[tuple]: return [tuple(row[key] for key in FIGURES) for row in read_metrics(folder/'metrics.csv')]


def wait_for_epochs(process: subprocess.Popen, folder: Path, n: int) -> None:
    "Until `n` epochs are written, or the process has ended."
    while process.poll() is None and len(read_metrics(folder/'metrics.csv')) < n: time.sleep(.05)
