"A run that is killed again and again."
import random
import time
from collections.abc import Callable

from fishnet_nb.training import read_checkpoint, read_metrics, read_record

from runs import TINY, figures, finish, start, wait_for_epochs


def test_run_killed_twenty_times_equals_one_that_was_not(tmp_path):
    "SIGKILL at random moments, each second time while a checkpoint is being written: the run always goes on from an intact state."
    (tmp_path/'data').mkdir()  # for the shapes
    args, draw = [*TINY, '--trainer.limit_train_batches=2', '--model.schedule=step', '--model.lr=0.001'], random.Random(0)
    folder = tmp_path/'results'/'hunted'
    process = start(tmp_path, '--name=hunted', '--trainer.max_epochs=1000', *args)
    for kill in range(20):
        wait_for_epochs(process, folder, len(read_metrics(folder/'metrics.csv')) + 1)
        if kill % 2: time.sleep(draw.uniform(0, .3))
        else: wait_until(lambda: process.poll() is not None or list((folder/'checkpoints').glob('.*')))
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        if (last := folder/'checkpoints'/'last.ckpt').exists(): read_checkpoint(last)
        epochs = f'--trainer.max_epochs={len(figures(folder)) + 2 if kill == 19 else 1000}'
        process = start(tmp_path, '--name=hunted', '--resume', epochs)
    finish(process)
    finish(start(tmp_path, '--name=unhurt', epochs, *args))
    assert sorted(path.name for path in (folder/'checkpoints').iterdir()) == ['best.ckpt', 'last.ckpt']
    assert figures(folder) == figures(tmp_path/'results'/'unhurt')
    assert read_record(folder)['test'] == read_record(tmp_path/'results'/'unhurt')['test']


def wait_until(happens: Callable[[], bool]) -> None:
    while not happens(): time.sleep(.0005)
