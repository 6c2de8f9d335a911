"A run that is killed again and again, and one whose disk is full."
import json
import random
import subprocess
import time
from pathlib import Path

import pytest

from fishnet_nb.training import fit, read_checkpoint, read_metrics, read_record

from runs import TINY, figures, finish, Run, wait_for_epochs, wait_until


def test_run_killed_twenty_times_equals_one_that_was_not(tmp_path):
    "SIGKILL at random moments, each second time while a checkpoint is being written: the run always goes on from an intact state."
    (tmp_path/'data').mkdir()  # for the shapes
    args, draw = [*TINY, '--trainer.limit_train_batches=8', '--model.schedule=step', '--model.lr=0.03'], random.Random(0)  # so that it learns, and isn't stopped early
    folder = tmp_path/'results'/'hunted'
    process = Run(tmp_path, '--name=hunted', '--trainer.max_epochs=1000', *args)
    for kill in range(20):
        wait_for_epochs(process, folder, len(read_metrics(folder/'metrics.csv')) + 1)
        if kill % 2: time.sleep(draw.uniform(0, .3))
        else: wait_until(lambda: process.poll() is not None or list((folder/'checkpoints').glob('.*')))
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        record = read_record(folder)
        assert record['status'] == 'running' and abs(record['epochs'] - len(read_metrics(folder/'metrics.csv'))) <= 1  # the one is written after the other
        if (last := folder/'checkpoints'/'last.ckpt').exists(): read_checkpoint(last)
        epochs = f'--trainer.max_epochs={len(figures(folder)) + 2 if kill == 19 else 1000}'
        process = Run(tmp_path, '--name=hunted', '--resume', epochs)
    finish(process)
    finish(Run(tmp_path, '--name=unhurt', epochs, *args))
    assert sorted(path.name for path in (folder/'checkpoints').iterdir()) == ['best.ckpt', 'last.ckpt']
    assert figures(folder) == figures(tmp_path/'results'/'unhurt')
    assert read_record(folder)['test'] == read_record(tmp_path/'results'/'unhurt')['test']


def test_run_killed_before_its_first_step_is_resumed(tmp_path):
    "Its data is checked and its network counted before that, which takes a while."
    (tmp_path/'data').mkdir()  # for the shapes
    folder = tmp_path/'results'/'fresh'
    process = Run(tmp_path, '--name=fresh', '--trainer.max_epochs=1', '--trainer.limit_train_batches=2', *TINY)
    wait_until(lambda: process.poll() is not None or (folder/'config.yaml').exists())
    process.kill()
    process.communicate()
    assert not (folder/'record.json').exists()
    with pytest.raises(ValueError, match='fresh is a run of the recipe quick, not of cpu'): fit('cpu', name='fresh', resume=True, root=tmp_path/'results')
    finish(Run(tmp_path, '--name=fresh', '--resume'))
    assert read_record(folder)['status'] == 'finished' and [path.name for path in (tmp_path/'results').iterdir()] == ['fresh']


def test_run_that_was_stopped_early_trains_no_more_when_resumed(tmp_path):
    "As if it had been killed after the epoch that took the last of its patience."
    (tmp_path/'data').mkdir()  # for the shapes
    finish(Run(tmp_path, '--name=early', '--trainer.max_epochs=100', '--trainer.limit_train_batches=2', '--model.schedule=step', '--model.lr=0.001', *TINY))
    folder = tmp_path/'results'/'early'
    before, test = figures(folder), read_record(folder)['test']
    assert 20 < len(before) < 100
    record = read_record(folder)
    (folder/'record.json').write_text(json.dumps({key: value for key, value in record.items() if key not in ('test', 'val', 'best_epoch')} | dict(status='running')))
    finish(Run(tmp_path, '--name=early', '--resume'))
    assert figures(folder) == before and read_record(folder)['test'] == test


@pytest.fixture
def small_disk(tmp_path) -> Path:
    "A disk of 3 MB."
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', disk], capture_output=True).returncode: pytest.skip('a small disk can be mounted by root only')
    yield disk
    subprocess.run(['umount', '--lazy', disk], check=True)


def test_full_disk_leaves_a_run_that_goes_on(tmp_path, small_disk):
    (tmp_path/'data').mkdir()  # for the shapes
    (tmp_path/'results').symlink_to(small_disk)
    process = Run(tmp_path, '--trainer.max_epochs=1000', '--trainer.limit_train_batches=2', '--model.schedule=step', *TINY)
    checkpoints = small_disk/'quick'/'checkpoints'
    wait_until(lambda: process.poll() is not None or (checkpoints/'last.ckpt').exists())
    fill(small_disk/'filler')
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and len(err.splitlines()) == 1, err
    assert 'could not be written (' in err and 'make room, then' in err, err
    for path in checkpoints.iterdir(): assert read_checkpoint(path)['state_dict']
    (small_disk/'filler').unlink()
    n = len(figures(small_disk/'quick'))
    finish(Run(tmp_path, '--name=quick', '--resume', f'--trainer.max_epochs={n + 2}'))
    assert len(figures(small_disk/'quick')) == n + 2


def fill(path: Path) -> None:
    "Write until the disk is full, and go on for a while, should something be deleted."
    with open(path, 'wb', buffering=0) as file:
        for _ in range(200):
            try:
                while True: file.write(b'0'*1000)
            except OSError: time.sleep(.01)
