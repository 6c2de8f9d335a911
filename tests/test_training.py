"Whole runs: killed and resumed, on two ranks, stopped, and read from hostile checkpoints."
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from copy import copy
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from fishnet_nb import training
from fishnet_nb.data import CIFAR_CLASSES, CIFARDataModule
from fishnet_nb.models import create_model, load_weights, pretrained_path, read_weights
from fishnet_nb.shapes import write_shapes
from fishnet_nb.testing import evaluate, export_weights, load_trained, plot_history, test_run
from fishnet_nb.training import (COLUMNS, Classifier, MovableCheckpoint, NOT_FINITE, RunRecorder, _callbacks, _parse, code_commit, compile_problem, fit, list_recipes, load_classifier, quiet_lightning,
                                 read_checkpoint, read_metrics, read_record, recipe_path, results_table, run_folder)

from runs import TINY, figures, finish, Run, start, wait_for_epochs, wait_until


@pytest.fixture(scope='module')
def work(tmp_path_factory) -> Path:
    "A folder with the shapes in data/, where the runs of this module run."
    folder = tmp_path_factory.mktemp('training')
    (folder/'data').mkdir()
    return folder


AVERAGED = [*TINY, '--trainer.max_epochs=4', '--trainer.limit_train_batches=20', '--data.on_device=true', '--data.augment=standard', '--data.cutout_px=8',
            '--model.mirror=true', '--trainer.callbacks=pytorch_lightning.callbacks.EMAWeightAveraging', '--trainer.callbacks.decay=0.9']


@pytest.fixture(scope='module')
def straight(work) -> Path:
    "The folder of a run that nothing stopped, with averaged weights."
    finish(Run(work, '--name=straight', *AVERAGED))
    return work/'results'/'straight'


def test_killed_and_resumed_run_equals_one_that_was_not(work, straight):
    for name, stop in ('killed', signal.SIGKILL), ('terminated', signal.SIGTERM), ('interrupted', signal.SIGINT):
        process = Run(work, f'--name={name}', *AVERAGED)
        wait_for_epochs(process, work/'results'/name, 2)
        process.send_signal(stop)
        process.communicate(timeout=60)
        assert process.returncode != 0 and len(figures(work/'results'/name)) < 4
        finish(Run(work, f'--name={name}', '--resume'))
        assert figures(work/'results'/name) == figures(straight)
        assert read_record(work/'results'/name)['test'] == read_record(straight)['test']


def told_by_all(process: subprocess.Popen) -> str:
    "What a run and its other ranks say of errors until all of them have ended; none is left if that takes too long."
    try: return process.communicate(timeout=120)[1]
    finally:
        with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)


def test_loader_processes_may_be_stopped_with_the_run(work):
    "SIGTERM to all, as from a job scheduler: the end of the others is no error of the run."
    args = [*TINY, '--data.num_workers=2', '--trainer.max_epochs=500', '--trainer.limit_train_batches=6', '--model.schedule=step', '--model.lr=0.001']
    process = start(work, '--name=loaders', *args, process_group=0)
    wait_for_epochs(process, work/'results'/'loaders', 1)
    os.killpg(process.pid, signal.SIGTERM)
    err = told_by_all(process)
    assert process.returncode == 130 and 'go on by: fishnet-nb fit quick --name loaders --resume' in err and 'Traceback' not in err, err
    assert read_record(work/'results'/'loaders')['status'] == 'interrupted'


def test_run_killed_in_its_test_is_tested_when_resumed(work, straight):
    "All its epochs are done, and only the record is missing; that it was moved meanwhile makes no difference. Then nothing is left to do, and nothing is changed."
    folder = Path(shutil.copytree(straight, work/'results'/'moved'))
    before, stated = figures(folder), read_record(folder)
    (folder/'record.json').unlink()
    finish(Run(work, '--name=moved', '--resume'))
    for key in 'test', 'val', 'best_epoch', 'epochs', 'device': assert read_record(folder)[key] == stated[key]
    assert figures(folder) == before
    best, record = folder/'checkpoints'/'best.ckpt', (folder/'record.json').read_bytes()
    content = torch.load(best, weights_only=True)
    another = (stated['best_epoch'] + 1) % 4
    assert content['epoch'] == stated['best_epoch']
    torch.save(content | {'epoch': another}, best)
    (folder/'record.json').unlink()
    finish(Run(work, '--name=moved', '--resume'))
    found = read_record(folder)
    assert found['best_epoch'] == another and found['val']['loss'] == read_metrics(folder/'metrics.csv')[another]['val_loss']  # those of the epoch whose weights are tested
    torch.save(content, best)
    (folder/'record.json').write_bytes(record)
    files = {path: path.read_bytes() for path in folder.glob('**/*.*')}
    assert 'results/moved was finished before, and nothing was trained' in finish(Run(work, '--name=moved/', '--resume'))
    for change, told in ('--trainer.benchmark=true', 'moved is finished'), ('--model.mirror=false', "model.mirror is True in results/moved and can't become False"):
        again = Run(work, '--name=moved', '--resume', change)
        assert told in again.communicate(timeout=60)[1] and again.returncode == 2
    assert files == {path: path.read_bytes() for path in folder.glob('**/*.*')}


def test_run_is_not_trained_twice_at_once(work):
    "The second process says so and leaves the first alone."
    args = ('--name=busy', '--trainer.max_epochs=1000', '--trainer.limit_train_batches=40', '--model.schedule=step', '--model.lr=0.001', *TINY)
    process = Run(work, *args)
    folder = work/'results'/'busy'
    wait_for_epochs(process, folder, 1)
    second = Run(work, '--name=busy', '--resume')
    assert 'busy is being trained by another process' in second.communicate(timeout=60)[1] and second.returncode == 2
    n = len(figures(folder))
    wait_for_epochs(process, folder, n + 1)
    assert process.poll() is None
    process.kill()
    process.communicate()
    finish(Run(work, '--name=busy', '--resume', f'--trainer.max_epochs={len(figures(folder)) + 1}'))
    assert not (folder/'.lock').exists()


def test_record_of_a_resumed_run_says_where_its_epochs_came_from(work):
    "Only where something has changed meanwhile."
    finish(Run(work, '--name=elsewhere', '--trainer.max_epochs=2', '--trainer.limit_train_batches=2', '--model.schedule=step', *TINY))
    folder = work/'results'/'elsewhere'
    stated, n = read_record(folder), 2
    assert 'earlier' not in stated
    for i, device in enumerate(('a card', 'a card', 'another card')):
        (folder/'record.json').write_text(json.dumps(read_record(folder) | dict(device=device)))
        finish(Run(work, '--name=elsewhere', '--resume', f'--trainer.max_epochs={n + i + 1}'))
    assert [(part['epochs'], part['device']) for part in read_record(folder)['earlier']] == [(n, 'a card'), (n + 1, 'a card'), (n + 2, 'another card')]
    finish(Run(work, '--name=elsewhere', '--resume', f'--trainer.max_epochs={n + 4}'))
    record = read_record(folder)
    assert len(record['earlier']) == 3 and record['device'] == stated['device'] and record['earlier'][0]['versions'] == stated['versions']
    assert results_table([record]).endswith(f'| a card; then another card; then {stated["device"]} |')


def test_averaged_weights_are_those_that_are_tested(work, straight, monkeypatch):
    "The test at the end of a run with averaged weights has them, as its best checkpoint has."
    monkeypatch.chdir(work)
    monkeypatch.setattr('fishnet_nb.testing.best_device', lambda: torch.device('cpu'))  # where the run was tested
    stated, found = read_record(straight), test_run('straight')[0]
    assert (found.top1_error, found.top5_error) == pytest.approx((stated['test']['top1_error'], stated['test']['top5_error']))
    content = read_checkpoint(straight/'checkpoints'/'best.ckpt')
    assert content['epoch'] == stated['best_epoch']
    assert any(not torch.equal(tensor, content['current_model_state'][name]) for name, tensor in content['state_dict'].items())


def test_two_ranks_with_half_the_batch_train_like_one_with_the_whole(work):
    "With batch norm synchronised the curves and the test errors are the same, but for rounding, and each test image is counted once, also where their number is odd."
    args = [*TINY, f'--data.data={write_shapes(work/"odd", 400, 41)}', '--trainer.max_epochs=2', '--trainer.limit_train_batches=6', '--trainer.accelerator=cpu', '--model.lr=0.01', '--model.schedule=step', '--trainer.precision=64-true']  # in float32 rounding grows from step to step
    ranks = ['--trainer.devices=2', '--trainer.strategy=ddp', '--trainer.sync_batchnorm=true', '--data.batch_size=16']
    finish(Run(work, '--name=whole', *args))
    finish(start(work, '--name=halves', *args, *ranks))
    for whole, halves in zip(*(read_metrics(work/'results'/name/'metrics.csv') for name in ('whole', 'halves')), strict=True):
        for key in 'train_loss', 'train_f1', 'val_loss', 'val_f1', 'val_top1_error', 'val_top5_error': assert halves[key] == pytest.approx(whole[key], rel=1e-5), key
    whole, halves = (read_record(work/'results'/name) for name in ('whole', 'halves'))
    assert halves['device'].startswith('2 × ') and not (work/'results'/'halves-2').exists()
    assert halves['test']['n'] == whole['test']['n'] == whole['data']['n_test'] == 41
    for key in 'loss', 'f1', 'top1_error', 'top5_error': assert halves['test'][key] == pytest.approx(whole['test'][key], rel=1e-5), key


def test_two_ranks_stop_on_sigterm_and_resume(work):
    "Both get the signal, as from a job scheduler, and most likely in the midst of a step, since these are long."
    args = [*TINY, '--data.batch_size=400', '--trainer.max_epochs=1000', '--trainer.limit_train_batches=6', '--trainer.limit_test_batches=2', '--model.schedule=step']
    process = start(work, '--name=ranks', *args, '--data.num_workers=1', '--trainer.accelerator=cpu', '--trainer.devices=2', '--trainer.strategy=ddp', process_group=0)
    wait_for_epochs(process, work/'results'/'ranks', 1)
    time.sleep(.7)
    os.killpg(process.pid, signal.SIGTERM)
    err = told_by_all(process)
    record = read_record(work/'results'/'ranks')
    assert process.returncode == 130 and 'go on by: fishnet-nb fit quick --name ranks --resume' in err and 'DataLoader' not in err, err
    epochs = record['epochs']
    assert record['status'] == 'interrupted' and 0 < epochs < 1000
    finish(start(work, '--name=ranks', '--resume', f'--trainer.max_epochs={epochs + 1}'))
    assert read_record(work/'results'/'ranks')['epochs'] == epochs + 1


def test_two_ranks_stop_on_sigterm_in_their_test(work):
    "Which is made up for when the run is resumed."
    args = [*TINY, '--trainer.max_epochs=1', '--trainer.limit_train_batches=2', '--model.schedule=step', '--trainer.callbacks=runs.WaitsInItsTest']
    process = start(work, '--name=tested', *args, '--trainer.accelerator=cpu', '--trainer.devices=2', '--trainer.strategy=ddp', process_group=0)
    wait_until(lambda: process.poll() is not None or all((work/f'testing-{rank}').is_file() for rank in range(2)))
    os.killpg(process.pid, signal.SIGTERM)
    err = told_by_all(process)
    assert process.returncode == 130 and 'go on by: fishnet-nb fit quick --name tested --resume' in err, err
    assert read_record(work/'results'/'tested')['status'] == 'interrupted'
    (work/'go-on').touch()
    finish(start(work, '--name=tested', '--resume'))
    record = read_record(work/'results'/'tested')
    assert record['epochs'] == 1 and record['test']['n'] == record['data']['n_test']


def test_rank_that_fails_ends_the_others(work):
    "Which would wait for it; and its error is the one that is told."
    args = [*TINY, '--trainer.max_epochs=2', '--trainer.limit_train_batches=2', '--model.schedule=step', '--trainer.callbacks=runs.FirstRankFails']
    ranks = ['--trainer.devices=2', '--trainer.strategy=ddp']
    process = start(work, '--name=fails', *args, *ranks, process_group=0)
    err = told_by_all(process)
    assert process.returncode == 2 and 'error: the cable was pulled' in err and err.count('error:') == 1 and 'Traceback' not in err, err
    assert read_record(work/'results'/'fails')['status'] == 'interrupted'


def test_run_whose_loss_is_not_finite_is_stopped(work, monkeypatch):
    monkeypatch.chdir(work)
    with pytest.raises(FloatingPointError, match='no longer finite.*lower the learning rate'):
        fit('quick', [*TINY, '--trainer.max_epochs=3', '--trainer.limit_train_batches=5', '--model.lr=1e30', '--model.arch_args.final_norm=false'], name='nan')
    with pytest.raises(FloatingPointError, match='no longer finite in epoch 1 .*by --model.lr$'):  # the last normalisation is there
        fit('quick', [*TINY, '--trainer.max_epochs=1', '--trainer.limit_train_batches=5', '--model.lr=1e30'], name='nan-normed')
    assert read_record('nan')['status'] == NOT_FINITE
    assert not (work/'results'/'nan'/'checkpoints'/'best.ckpt').exists()


@pytest.mark.parametrize('args, message', [
    (['--trainer.max_epoch=3'], 'max_epoch'), (['--model.lr=fast'], 'lr'), (['--model.optimizer=lion'], "allowed are 'adam', 'sgd'"),
    (['--model.arch=fishnet98'], "did you mean 'fishnet99'"), (['--data.val_fraction=0'], 'val_fraction'), (['--trainer.check_val_every_n_epoch=2'], 'check_val_every_n_epoch'),
    (['--model.arch_args.preact=maybe'], 'preact'), (['--model.arch_args.num_classes=5'], 'arch_args has no num_classes'), (['--trainer.max_epochs=-1'], 'max_epochs'),
    (['--trainer.max_steps=4'], 'max_steps'), (['--trainer.val_check_interval=0.5'], 'val_check_interval'), (['--trainer.val_check_interval=1'], 'val_check_interval'), (['--trainer.val_check_interval=00:00:10:00'], 'val_check_interval'), (['--trainer.max_time=00:00:01:00'], 'max_time'), (['--trainer.barebones=true'], 'barebones'),
    (['--trainer.limit_test_batches=0'], 'limit_test_batches'), (['--trainer.limit_test_batches=0.001'], 'leaves none for the test'), (['--trainer.accumulate_grad_batches=0'], 'accumulate_grad_batches is 0'), (['--trainer.accumulate_grad_batches=-4'], 'accumulate_grad_batches is -4'),
    (['--trainer.gradient_clip_val=-1'], 'gradient_clip_val is -1'), (['--data.cutout_px=33'], 'from 0 to 32'), (['--data.data='], 'is empty'), (['--model.lr=-1'], 'lr=-1.0: a number from 0 up'), (['--model.weight_decay=-1'], 'weight_decay=-1.0'), (['--model.in_channels=1'], 'the images have 3 channels'), (['--model.label_smoothing=2'], 'label_smoothing=2'),
    (['--trainer.limit_val_batches=0'], 'limit_val_batches'), (['--trainer.fast_dev_run=true'], 'fast_dev_run'), (['--trainer.max_epochs=0'], 'max_epochs')])
def test_wrong_argument_is_named(work, monkeypatch, args, message):
    monkeypatch.chdir(work)
    with pytest.raises(ValueError, match=message): fit('quick', [*TINY, *args], name='wrong')
    assert not (work/'results'/'wrong').exists()


@pytest.mark.parametrize('name', ['', '.', '..', 'x/..', '../x', 'x/y', '/x', '-x', 'a\nb', 'bench', 'results/pretrained'])
def test_a_run_has_a_name(work, monkeypatch, name):
    monkeypatch.chdir(work)
    with pytest.raises(ValueError, match='not a name for a run'): fit('quick', TINY, name=name)


@pytest.mark.parametrize('precision', ['32-true', 'bf16-true'])
def test_sanity_check_before_the_training_does_no_harm(work, monkeypatch, precision):
    monkeypatch.chdir(work)
    args = [*TINY, f'--trainer.precision={precision}', '--trainer.max_epochs=2', '--trainer.limit_train_batches=1']
    checked, unchecked = (fit('quick', [*args, f'--trainer.num_sanity_val_steps={n}'], name='sane') for n in (1, 0))
    assert figures(checked) == figures(unchecked) and read_record(checked)['test'] == read_record(unchecked)['test']


@pytest.mark.parametrize('given, preact', [('false', False), ('False', False), ('no', False), ('true', True)])
def test_switches_of_the_network_are_read_as_such(work, monkeypatch, given, preact):
    "Not as texts, each of which would count as True; nor numbers as texts."
    monkeypatch.chdir(work)
    with quiet_lightning(): model = _parse(recipe_path('quick'), [*TINY, f'--model.arch_args.preact={given}', '--model.arch_args.k=2']).model
    assert isinstance(model.model.classifier[0], torch.nn.BatchNorm2d) and isinstance(model.model.tail.stem[0], torch.nn.Conv2d) == preact
    assert model.hparams.arch_args['k'] == 2 and model.hparams.arch_args['preact'] is preact


@pytest.mark.parametrize('recipe', list_recipes())
def test_recipes_can_be_read(work, monkeypatch, recipe):
    "Each recipe makes a model, data and a trainer; the data is here the shapes, for all of them."
    monkeypatch.chdir(work)
    with quiet_lightning(): cli = _parse(recipe_path(recipe), ['--data.data=shapes'])
    assert cli.model.hparams.num_classes == 10


def test_student_is_the_recipe_of_the_student_implementation(work, monkeypatch):
    "And one seed is that of all."
    monkeypatch.chdir(work)
    with quiet_lightning(): cli = _parse(recipe_path('student'), ['--data.data=shapes', '--seed_everything=7', '--trainer.accelerator=cpu'])
    model, data = cli.model.hparams, cli.datamodule.hparams
    assert (model.arch, model.arch_args, model.optimizer, model.lr, model.weight_decay, model.schedule) == ('fishnet99', None, 'adam', .01, 1e-4, 'step')
    assert (data.batch_size, data.val_fraction, data.augment, data.cutout_px) == (256, .2, 'student', 0)
    assert (cli.trainer.max_epochs, cli.trainer.precision, data.seed) == (30, '32-true', 7)


def test_mirrored_answer_is_the_mean_confidence():
    classifier, images = Classifier('fishnet73', dict(widths=[8, 16], tail=[1, 1]), mirror=True).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        mean = sum(classifier.model(x).softmax(1) for x in (images, images.flip(3)))/2
        torch.testing.assert_close(classifier(images).exp(), mean, atol=1e-5, rtol=1e-4)


def test_label_smoothing_is_of_the_training_loss_alone():
    classifier, batch = Classifier('fishnet73', dict(widths=[8, 16], tail=[1, 1]), label_smoothing=.5).eval(), dict(img=torch.randn(4, 3, 8, 8), label=torch.arange(4))
    with torch.no_grad():
        scores, loss = classifier(batch['img']), classifier.training_step(batch, 0)
        classifier.validation_step(batch, 0)
    torch.testing.assert_close(loss, F.cross_entropy(scores, batch['label'], label_smoothing=.5))
    found = training.summarise(classifier.metrics['val_metrics'])['loss'].item()
    assert found == pytest.approx(F.cross_entropy(scores, batch['label']).item(), rel=1e-5)


def test_a_trained_network_can_be_trained_anew_for_longer(tmp_path):
    "Only a run that is resumed is bound to the steps that its one-cycle schedule had."
    def trainer(n): return Trainer(max_epochs=n, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    classifier, batches = Classifier('fishnet73', dict(widths=[8, 16], tail=[1, 1]), schedule='onecycle'), DataLoader([dict(img=torch.randn(3, 16, 16), label=0)]*4, 2)
    with quiet_lightning():
        (first := trainer(1)).fit(classifier, batches)
        first.save_checkpoint(tmp_path/'one.ckpt')
        trainer(1).test(classifier, batches, ckpt_path=tmp_path/'one.ckpt', verbose=False)
        trainer(2).fit(classifier, batches)
        trainer(2).fit(Classifier.load_from_checkpoint(tmp_path/'one.ckpt', weights_only=True), batches)
        with pytest.raises(ValueError, match='ends after 2 steps, and now there would be 4'): trainer(2).fit(classifier, batches, ckpt_path=tmp_path/'one.ckpt')
        second = trainer(2)
        second.fit(classifier, batches)
        second.save_checkpoint(tmp_path/'two.ckpt')
        with pytest.raises(ValueError, match='ends after 4 steps, and now there would be 2'): trainer(1).fit(classifier, batches, ckpt_path=tmp_path/'two.ckpt')


def test_a_network_that_was_evaluated_is_trained_as_a_fresh_one_is():
    "In training mode; parts of it that were put in eval mode stay so."
    classifier, batches = Classifier('fishnet73', dict(widths=[8, 16], tail=[1, 1])), DataLoader([dict(img=torch.randn(3, 16, 16), label=0)]*4, 2)
    def seen(part): return {norm.num_batches_tracked.item() for norm in part.modules() if isinstance(norm, torch.nn.BatchNorm2d)}
    def train():
        with quiet_lightning(): Trainer(max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False).fit(classifier, batches)
    evaluate(classifier, batches)
    train()
    assert seen(classifier) == {2}
    classifier.model.tail.eval()
    train()
    assert seen(classifier.model.tail) == {2} and seen(classifier.model.head) == {4}


def test_training_does_not_go_on_with_another_network(tmp_path):
    "Also where no run is resumed, but Lightning is given a checkpoint."
    def trainer(): return Trainer(max_epochs=2, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    network, other = (Classifier('fishnet73', dict(widths=widths, tail=[1, 1])) for widths in ([8, 16], [16, 32]))
    batches = DataLoader([dict(img=torch.randn(3, 16, 16), label=0)]*4, 2)
    with quiet_lightning():
        (first := trainer()).fit(network, batches)
        first.save_checkpoint(tmp_path/'one.ckpt')
        with pytest.raises(ValueError, match=r'the checkpoint is of a fishnet73 with .*\[8, 16\].*, and this network is a fishnet73 with .*\[16, 32\]'): trainer().fit(other, batches, ckpt_path=tmp_path/'one.ckpt', weights_only=True)


def test_what_would_leave_no_record_is_refused(work, monkeypatch):
    monkeypatch.chdir(work)
    with pytest.raises(ValueError, match='in a terminal'): fit('quick', [*TINY, '--trainer.accelerator=cpu', '--trainer.devices=2', '--trainer.strategy=ddp_fork'], name='forked')
    monkeypatch.setattr(torch, 'compile', lambda network: 1/0)
    with pytest.raises(ValueError, match='torch.compile doesn.t work here .division by zero.: .* --model.compile=false'): fit('quick', [*TINY, '--model.compile=true'], name='uncompiled')
    def full(network: object): raise torch.OutOfMemoryError('the device is full')
    monkeypatch.setattr(torch, 'compile', full)
    with pytest.raises(torch.OutOfMemoryError, match='is full'): fit('quick', [*TINY, '--model.compile=true'], name='uncompiled')
    with pytest.raises(ValueError, match='a list of texts'): fit('quick', '--trainer.max_epochs=1', name='texts')
    assert not any((work/'results'/name).exists() for name in ('forked', 'uncompiled', 'texts'))


def test_what_can_go_on_is_named(work, monkeypatch):
    "Of a finished run there may be the record alone, as of those that are kept with the project."
    monkeypatch.chdir(work)
    finish(Run(work, '--name=kept', '--trainer.max_epochs=1', '--trainer.limit_train_batches=1', *TINY))
    shutil.copytree(work/'results'/'kept', work/'results'/'kept-2')
    (work/'results'/'kept-2'/'record.json').write_text(json.dumps(read_record('kept') | dict(status='interrupted')))
    shutil.rmtree(work/'results'/'kept'/'checkpoints')
    for name in 'kept', 'nobody', 'results/nobody':
        with pytest.raises(FileNotFoundError, match='what can go on: .*--name kept-2 --resume'): fit('quick', name=name, resume=True)
    assert fit(Path('quick'), name='results/kept-2', resume=True) == Path('results/kept-2')


def test_nothing_of_slurm_is_taken_for_the_run(work, monkeypatch):
    "Lightning would begin with what another program left, and begin anew, without --resume, when a job's time is up."
    monkeypatch.chdir(work)
    for name, value in dict(SLURM_NTASKS='1', SLURM_JOB_NAME='training', SLURM_JOB_ID='1', SLURM_PROCID='0', SLURM_LOCALID='0', SLURM_NODEID='0').items(): monkeypatch.setenv(name, value)
    args = [*TINY, '--trainer.max_epochs=1', '--trainer.limit_train_batches=1']
    Path('hpc_ckpt_1.ckpt').touch()
    with pytest.raises(ValueError, match='hpc_ckpt_1.ckpt was left there by another program'): fit('quick', args, name='slurm')
    Path('hpc_ckpt_1.ckpt').unlink()
    before = signal.getsignal(signal.SIGUSR1)
    seen = []
    monkeypatch.setattr(RunRecorder, 'on_train_end', lambda *_: seen.append(signal.getsignal(signal.SIGUSR1)), raising=False)
    assert read_record(fit('quick', args, name='slurm'))['status'] == 'finished'
    assert seen == [before]  # nothing waits for the signal that says so


def test_compiled_run_goes_on_and_is_tested(work, monkeypatch, capsys):
    "As `best` is trained: compiled, with averaged weights, in bfloat16, validated by mirror images too."
    if problem := compile_problem(torch.device('cpu')): pytest.skip(problem)
    monkeypatch.chdir(work)
    args = [*AVERAGED, '--model.compile=true', '--trainer.precision=bf16-mixed', '--trainer.limit_train_batches=2', '--trainer.limit_test_batches=2']
    folder = fit('quick', [*args, '--model.schedule=step', '--trainer.max_epochs=2'], name='compiled')
    assert 'compiled, by which the first epoch takes minutes longer' in capsys.readouterr().out
    assert fit('quick', ['--trainer.max_epochs=3'], name='compiled', resume=True) == folder
    assert read_record(folder)['status'] == 'finished' and len(figures(folder)) == 3
    eager, content = load_classifier(folder/'checkpoints'/'best.ckpt'), read_checkpoint(folder/'checkpoints'/'best.ckpt')
    assert not any('_orig_mod' in name for name in content['state_dict']) and not eager.hparams.compile
    images = torch.randn(2, 3, 32, 32)
    scores = eager(images)
    eager.model.compile()
    assert torch.allclose(eager(images), scores, atol=1e-4)


def test_compiled_for_training_alone():
    compiled = []
    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward
    classifier = Classifier('fishnet73', dict(widths=[8, 16], tail=[1, 1]), mirror=True, compile=True)
    classifier.model.compile(backend=backend)
    batch = dict(img=torch.randn(2, 3, 32, 32), label=torch.arange(2))
    classifier.eval().validation_step(batch, 0), classifier.test_step(batch, 0)
    assert not compiled
    classifier.train().training_step(batch, 0)
    assert compiled
    n = len(compiled)
    classifier.on_fit_end()
    classifier.eval()(batch['img'][:1])
    assert len(compiled) == n


@pytest.mark.parametrize('device, n_ranks, n_parts, callbacks, mode', [
    ('cuda', 1, 1, [], 'reduce-overhead'), ('cuda', 2, 1, [], None), ('cuda', 1, 2, [], None), ('cuda', 1, 1, [GradientAccumulationScheduler({4: 2})], None), ('cpu', 1, 1, [], None)])
def test_one_gpu_trains_by_graphs(monkeypatch, device, n_ranks, n_parts, callbacks, mode):
    "Each step needs gradients of its own, and nobody else's."
    classifier, found = Classifier('fishnet73', dict(widths=[8, 16], tail=[1, 1]), compile=True), []
    monkeypatch.setattr(Classifier, 'device', torch.device(device))
    monkeypatch.setattr(training, 'compile_problem', lambda device: '')
    monkeypatch.setattr(classifier.model, 'compile', lambda mode: found.append(mode))
    classifier._trainer = SimpleNamespace(world_size=n_ranks, accumulate_grad_batches=n_parts, callbacks=callbacks)
    classifier.on_fit_start()
    assert found == [mode]


def test_only_runs_with_the_step_schedule_are_stopped_early(tmp_path):
    "One-cycle gains most at its end, and may gain nothing for long before."
    stopped = {schedule: any(isinstance(callback, EarlyStopping) for callback in _callbacks(tmp_path, None, schedule)) for schedule in ('step', 'onecycle')}
    assert stopped == dict(step=True, onecycle=False)


def test_folder_of_runs_that_leads_nowhere_is_said(tmp_path):
    "A link to a disk that isn't mounted."
    (tmp_path/'results').symlink_to(tmp_path/'gone')
    with pytest.raises(OSError, match='results'): run_folder(tmp_path/'results', 'mine', resume=False)


def test_same_few_images_can_be_learned_by_heart(work, monkeypatch):
    "Lightning's trick to find faults gives them in their order, without an epoch's draws."
    monkeypatch.chdir(work)
    seen, step = [], Classifier.training_step
    def watched(self, batch, batch_idx):
        seen.append(batch['label'].tolist())
        return step(self, batch, batch_idx)
    monkeypatch.setattr(Classifier, 'training_step', watched)
    with quiet_lightning(): folder = fit('quick', [*TINY, '--data.on_device=true', '--trainer.overfit_batches=2', '--trainer.max_epochs=2', '--model.schedule=step'], name='by-heart')
    assert read_record(folder)['status'] == 'finished'
    assert len(seen) == 4 and seen[:2] == seen[2:] and seen[0] != seen[1]


def test_a_name_is_not_taken_twice_and_a_schedule_not_stretched(work, monkeypatch):
    args = [*TINY, '--trainer.max_epochs=1', '--trainer.limit_train_batches=1']
    for _ in range(2): finish(Run(work, '--name=twice', *args))
    assert json.loads((work/'results'/'twice-2'/'record.json').read_text())['name'] == 'twice-2'
    monkeypatch.chdir(work)
    files = {path: path.read_bytes() for path in (work/'results'/'twice').glob('*.*')}
    with pytest.raises(ValueError, match='one-cycle schedule of this run ends after 1 steps, and now there would be [0-9]+: resume it with the epochs'): fit('quick', ['--trainer.max_epochs=2'], name='twice', resume=True)
    for change, told in {'--model.arch=fishnet99': "model.arch is fishnet73 in results/twice and can't become fishnet99", '--model.lr=0.5': 'model.lr is 0.1', '--model.schedule=step': 'model.schedule is onecycle',
                         '--seed_everything=7': 'seed_everything is 42', '--data.val_fraction=0.5': 'data.val_fraction is 0.1', '--data.batch_size=8': 'data.batch_size is 32', '--trainer.accumulate_grad_batches=2': 'trainer.accumulate_grad_batches is 1'}.items():
        with pytest.raises(ValueError, match=told): fit('quick', [change], name='twice', resume=True)
    with pytest.raises(ValueError, match='a run of the recipe quick, not of cpu'): fit('cpu', name='twice', resume=True)
    last = work/'results'/'twice'/'checkpoints'/'last.ckpt'
    whole = last.read_bytes()
    for raw in (b'', b'garbage', whole[:1000]):
        last.write_bytes(raw)
        with pytest.raises(ValueError, match='last.ckpt is (damaged|refused)') as told: fit('quick', name='twice', resume=True)
        assert 'weights_only' not in str(told.value)
    last.write_bytes(whole)
    (work/'results'/'twice'/'checkpoints'/'last.ckpt').unlink()
    with pytest.raises(FileNotFoundError, match='last.ckpt is missing, so this run can\'t go on'): fit('quick', name='twice', resume=True)
    assert files == {path: path.read_bytes() for path in (work/'results'/'twice').glob('*.*')}


def test_run_does_not_go_on_with_other_data(work, tmp_path, monkeypatch):
    "Its record names one, and would claim all epochs for it."
    monkeypatch.chdir(work)
    args = [f'--data.data={tmp_path/"own"}', '--trainer.max_epochs=1', '--trainer.limit_train_batches=1', '--model.schedule=step']
    write_shapes(tmp_path/'own', 400, 40, seed=1)
    with quiet_lightning(): folder = fit('quick', [*TINY, *args], name='own')
    assert read_record(folder)['data']['name'] == 'own'  # not the library's shapes, on which its weights would be tested
    files = {path: path.read_bytes() for path in folder.glob('**/*.*')}
    shutil.rmtree(tmp_path/'own')
    write_shapes(tmp_path/'own', 400, 40, seed=2)
    with pytest.raises(ValueError, match='run on other data, of SHA-256 .* train without --resume'): fit('quick', ['--trainer.max_epochs=2'], name='own', resume=True)
    assert files == {path: path.read_bytes() for path in folder.glob('**/*.*')}


def test_names_are_those_of_the_images_that_a_run_saw(work, tmp_path, monkeypatch):
    "Also where FISHNET_DATA leads a recipe for CIFAR-10 elsewhere, and after that has gone; testing on other data says so."
    monkeypatch.chdir(work)
    names = [f'thing {i}' for i in range(10)]
    (write_shapes(tmp_path/'own', 400, 40)/'batches.meta').write_bytes(pickle.dumps({b'label_names': names}))
    monkeypatch.setenv('FISHNET_DATA', str(tmp_path/'own'))
    with quiet_lightning(): folder = fit('quick', [*TINY, '--data.data=cifar10', '--trainer.max_epochs=1', '--trainer.limit_train_batches=1', '--model.schedule=step'], name='named')
    write_shapes(tmp_path/'other', 400, 40)
    monkeypatch.setenv('FISHNET_DATA', str(tmp_path/'other'))
    best = folder/'checkpoints'/'best.ckpt'
    assert load_trained(best)[1] == load_trained(export_weights(folder, tmp_path/'named.safetensors'))[1] == tuple(names)
    with pytest.raises(ValueError, match='best.ckpt knows the classes thing 0, thing 1'): test_run(folder)
    assert len(test_run(folder, 'cifar10')[0].labels) == 40
    trainer = Trainer(accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    with quiet_lightning(): found, = trainer.test(load_classifier(best), CIFARDataModule('cifar10', num_workers=0), str(best), verbose=False, weights_only=True)
    assert found['test_n'] == 40
    content = torch.load(best, weights_only=True)
    for wrong in (names[:9], ['\x1b]0;title\x07', *names[1:]], 5):
        torch.save(content | {'CIFARDataModule': content['CIFARDataModule'] | dict(classes=wrong)}, tmp_path/'wrong.ckpt')
        with pytest.raises(ValueError, match='wrong.ckpt is refused: what it names as classes is not a list of 10 names'): load_trained(tmp_path/'wrong.ckpt')
    torch.save(content | {'CIFARDataModule': 5}, tmp_path/'nameless.ckpt')
    assert load_trained(tmp_path/'nameless.ckpt')[1] == CIFAR_CLASSES and len(test_run(tmp_path/'nameless.ckpt')[0].labels) == 40  # guessed, so not held against the data


class OwnImages(LightningDataModule):
    "Somebody else's, with hyperparameters of its own."
    def __init__(self, root: str = 'photos', as_tuples: bool = False):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader:
        images, labels = torch.randn(4, 3, 8, 8), torch.arange(4) % 2
        if self.hparams.as_tuples: return DataLoader(TensorDataset(images, labels), batch_size=2)
        return DataLoader([dict(img=image, label=label) for image, label in zip(images, labels)], batch_size=2)

    def predict_dataloader(self) -> DataLoader: return self.train_dataloader()


def test_classifier_of_a_data_module_of_ones_own(tmp_path):
    trainer, another = (Trainer(accelerator='cpu', max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False) for _ in range(2))
    classifier = Classifier('fishnet73', dict(widths=[8, 16], tail=[1, 1]), num_classes=2)
    with quiet_lightning():
        trainer.fit(classifier, OwnImages())
        trainer.save_checkpoint(tmp_path/'own.ckpt')
        assert [scores.shape for scores in trainer.predict(classifier, OwnImages())] == [(2, 2), (2, 2)]
        with pytest.raises(TypeError, match=r'a batch is a list, and must be a dict\(img'): another.fit(classifier, OwnImages(as_tuples=True))
        ten = Classifier('fishnet73', dict(widths=[8, 16], tail=[1, 1]))
        another.fit(ten, OwnImages().train_dataloader())
        another.save_checkpoint(tmp_path/'ten.ckpt')
    assert load_trained(tmp_path/'ten.ckpt')[1] == tuple(f'class {i}' for i in range(10))  # as many as CIFAR-10 has, and none of its
    with pytest.raises(ValueError, match='ten.ckpt does not say what it was trained on'): test_run(tmp_path/'ten.ckpt')
    assert load_trained(tmp_path/'own.ckpt')[1] == ('class 0', 'class 1')
    endless = Trainer(accelerator='cpu', max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    with quiet_lightning(), pytest.raises(ValueError, match='the trainer needs max_epochs'): endless.fit(Classifier('fishnet73', dict(widths=[8, 16], tail=[1, 1]), schedule='onecycle'), OwnImages())
    with pytest.raises(ValueError, match='own.ckpt does not say what it was trained on, .*: name its data by --data'): test_run(tmp_path/'own.ckpt')


def test_numbers_of_numpy_are_plain_in_a_checkpoint(work, tmp_path, monkeypatch):
    "So that it can be read and resumed."
    monkeypatch.chdir(work)
    real, whole = np.float64, np.int64
    def classifier(): return Classifier('fishnet73', dict(widths=[8, 16], tail=[1, 1]), num_classes=whole(10), in_channels=whole(3), lr=real(.01), weight_decay=real(1e-4), label_smoothing=real(.1))
    module = CIFARDataModule('shapes', batch_size=whole(8), val_fraction=real(.1), seed=whole(1), cutout_px=whole(4), num_workers=whole(0))
    def trainer(n): return Trainer(accelerator='cpu', max_epochs=n, limit_train_batches=1, limit_val_batches=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    with quiet_lightning():
        (first := trainer(1)).fit(classifier(), module)
        first.save_checkpoint(tmp_path/'numpy.ckpt')
        assert load_classifier(tmp_path/'numpy.ckpt').hparams.lr == .01
        trainer(2).fit(classifier(), module, ckpt_path=tmp_path/'numpy.ckpt', weights_only=True)
    with pytest.raises(ValueError, match='plain numbers and lists'): Classifier('fishnet73', dict(widths=[8, 16], tail=[1, 1], k=real(2)))


def test_run_that_was_stopped_early_is_not_resumed_for_more_epochs(work, monkeypatch):
    "And its config.yaml doesn't keep whether there was a terminal for a progress bar."
    monkeypatch.chdir(work)
    args = [*TINY, '--trainer.limit_train_batches=1', '--model.schedule=step']
    with quiet_lightning(): folder = fit('quick', [*args, '--trainer.max_epochs=2'], name='early')
    assert 'enable_progress_bar' not in (folder/'config.yaml').read_text()
    path = folder/'checkpoints'/'last.ckpt'
    checkpoint = torch.load(path, weights_only=True)
    stopping, = (state for name, state in checkpoint['callbacks'].items() if name.startswith('EarlyStopping'))
    stopping['wait_count'] = stopping['patience']
    torch.save(checkpoint, path)
    files = {path: path.read_bytes() for path in folder.glob('**/*.*')}
    with quiet_lightning(), pytest.raises(ValueError, match='finished, and no epoch is left to train, for it was stopped early: nothing was changed'): fit('quick', ['--trainer.max_epochs=4'], name='early', resume=True)
    assert files == {path: path.read_bytes() for path in folder.glob('**/*.*')}
    record = json.loads((folder/'record.json').read_text())
    (folder/'record.json').write_text(json.dumps(record | {'status': 'interrupted'}))  # it was killed in the midst of its test
    with quiet_lightning(): fit('quick', ['--trainer.max_epochs=4'], name='early', resume=True)
    found = read_record(folder)
    assert found['status'] == 'finished' and found['epochs'] == 2 and found['test'] == record['test']


def test_run_that_another_callback_of_ones_own_watches_is_stopped_early_all_the_same(work, monkeypatch):
    "Resumed after it was killed in its test, it trains no further, though the other one has patience left."
    monkeypatch.chdir(work)
    args = [*TINY, '--trainer.limit_train_batches=1', '--model.schedule=step', '--trainer.callbacks=EarlyStopping', '--trainer.callbacks.monitor=train_loss', '--trainer.callbacks.patience=100']
    with quiet_lightning(): folder = fit('quick', [*args, '--trainer.max_epochs=2'], name='two-watch')
    path = folder/'checkpoints'/'last.ckpt'
    checkpoint = torch.load(path, weights_only=True)
    stopping, = (state for name, state in checkpoint['callbacks'].items() if name.startswith('EarlyStopping') and 'val_loss' in name)
    stopping['wait_count'] = stopping['patience']
    torch.save(checkpoint, path)
    (folder/'record.json').write_text(json.dumps(read_record(folder) | {'status': 'interrupted'}))
    with quiet_lightning(): fit('quick', ['--trainer.max_epochs=4'], name='two-watch', resume=True)
    assert (read_record(folder)['status'], read_record(folder)['epochs'], len(figures(folder))) == ('finished', 2, 2)


def test_run_that_has_no_patience_trains_all_the_same(work, monkeypatch):
    monkeypatch.chdir(work)
    args = [*TINY, '--trainer.limit_train_batches=1', '--trainer.max_epochs=1', '--trainer.callbacks=EarlyStopping', '--trainer.callbacks.monitor=train_loss', '--trainer.callbacks.patience=0']
    with quiet_lightning(): folder = fit('quick', args, name='impatient')
    assert (read_record(folder)['status'], len(figures(folder))) == ('finished', 1)


def test_run_goes_on_without_the_device_that_it_had(work, monkeypatch):
    monkeypatch.chdir(work)
    with quiet_lightning(): folder = fit('quick', [*TINY, '--trainer.max_epochs=1', '--trainer.limit_train_batches=1', '--model.schedule=step'], name='had-a-tpu')
    config = (folder/'config.yaml').read_text()
    assert config.count('accelerator: cpu') == 1
    (folder/'config.yaml').write_text(config.replace('accelerator: cpu', 'accelerator: tpu'))
    with quiet_lightning(), pytest.raises(ValueError, match='model.lr is .* and can\'t become 0.5'): fit('quick', ['--trainer.accelerator=cpu', '--model.lr=0.5'], name='had-a-tpu', resume=True)
    with quiet_lightning(): fit('quick', ['--trainer.accelerator=cpu', '--trainer.max_epochs=2'], name='had-a-tpu', resume=True)
    assert read_record(folder)['epochs'] == 2


def test_an_epoch_that_is_in_no_checkpoint_is_not_the_runs(work, monkeypatch):
    "Its figures go when the run is resumed, also where no epoch is left to train."
    monkeypatch.chdir(work)
    with quiet_lightning(): folder = fit('quick', [*TINY, '--trainer.max_epochs=1', '--trainer.limit_train_batches=1', '--model.schedule=step'], name='diverged')
    before, record = figures(folder), read_record(folder)
    first = (folder/'metrics.csv').read_text().splitlines()[1]
    with open(folder/'metrics.csv', 'a') as file: file.write(re.sub(r'^0,', '1,', first) + '\n')
    assert len(figures(folder)) == 2
    (folder/'record.json').write_text(json.dumps(record | {'status': NOT_FINITE, 'epochs': 2}))
    with quiet_lightning(): fit('quick', ['--trainer.max_epochs=1'], name='diverged', resume=True)
    found = read_record(folder)
    assert figures(folder) == before and [found[key] for key in ('status', 'epochs', 'wall_s', 'test')] == ['finished', 1, record['wall_s'], record['test']]


def test_every_rank_is_told_the_folder_of_the_run(work):
    "And when its record is complete, also where the name was taken. The ranks leave each other before Python ends."
    (work/'results'/'told').mkdir(parents=True)
    (work/'told.py').write_text(f'''
import atexit, os
import torch.distributed as dist
rank = os.environ.get('LOCAL_RANK', 0)
atexit.register(lambda: open(f'left-{{rank}}', 'w').write(f'{{dist.is_initialized()}}'))  # the last to be called, for it is the first
from fishnet_nb.training import fit, read_record
folder = fit('quick', {[*TINY, '--trainer.max_epochs=1', '--trainer.limit_train_batches=2', '--model.schedule=step', '--trainer.devices=2', '--trainer.strategy=ddp']}, name='told')
open(f'told-{{rank}}', 'w').write(f'{{folder.name}} {{read_record(folder)["status"]}} {{dist.is_initialized()}}')
''')
    subprocess.run([sys.executable, 'told.py'], cwd=work, env=os.environ | {'OMP_NUM_THREADS': '1'}, timeout=180, check=True)
    assert [(work/f'told-{rank}').read_text() for rank in (0, 1)] == ['told-2 finished True']*2
    assert [(work/f'left-{rank}').read_text() for rank in (0, 1)] == ['False']*2


def test_trainer_predicts_the_test_images(work, monkeypatch):
    monkeypatch.chdir(work)
    classifier, module = Classifier('fishnet73', dict(widths=[8, 16], tail=[1, 1]), num_classes=5), CIFARDataModule('shapes', batch_size=7, num_workers=0)
    with quiet_lightning(): found = torch.cat(Trainer(accelerator='cpu', logger=False, enable_progress_bar=False, limit_predict_batches=2).predict(classifier, module))
    batch = next(iter(CIFARDataModule('shapes', batch_size=14, num_workers=0).test_dataloader()))
    with torch.no_grad(): assert torch.allclose(found, classifier.eval()(batch['img']), atol=1e-5)


def test_figures_are_counted_in_float32(work, monkeypatch):
    "Where the network is of half precision, whose whole numbers end at 256."
    monkeypatch.chdir(work)
    with quiet_lightning(): folder = fit('quick', [*TINY, '--trainer.precision=bf16-true', '--trainer.max_epochs=1', '--trainer.limit_train_batches=1', '--model.schedule=step'], name='half')
    record = read_record(folder)
    assert record['test']['n'] == record['data']['n_test'] > 256 and record['test']['loss'] != torch.tensor(record['test']['loss']).bfloat16().item()


def test_parts_of_a_batch_count_alike_where_each_image_is_seen_twice():
    "The share of a part goes by the images that the loader took, not by what was made of them."
    def mirrored(batch):
        images, labels = (torch.stack(part) for part in zip(*batch))
        return dict(img=torch.cat([images, images.flip(3)]), label=labels.repeat(2))
    seen = []
    class Watched(Classifier):
        def _weight(self, batch_idx):
            seen.append(super()._weight(batch_idx))
            return seen[-1]
    loader = DataLoader(TensorDataset(torch.randn(20, 3, 8, 8), torch.arange(20) % 10), 8, collate_fn=mirrored)
    with quiet_lightning(): Trainer(accelerator='cpu', max_epochs=1, accumulate_grad_batches=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False).fit(Watched('fishnet73', dict(widths=[8, 16], tail=[1, 1])), loader)
    assert seen == [1, 1, 2]  # the last step has one part of two


def test_a_one_cycle_schedule_wants_to_know_its_steps():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True: yield dict(img=torch.zeros(3, 8, 8), label=0)
    trainer = Trainer(accelerator='cpu', max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    with quiet_lightning(), pytest.raises(ValueError, match='max_steps where a loader'): trainer.fit(Classifier('fishnet73', dict(widths=[8, 16], tail=[1, 1]), schedule='onecycle'), DataLoader(Endless(), 4))


def test_what_a_checkpoint_may_not_hold_is_named(tmp_path):
    torch.save(dict(state_dict={}, hyper_parameters={}, datamodule_hyper_parameters=dict(root=tmp_path)), tmp_path/'own.ckpt')
    with pytest.raises(ValueError, match="such as 'pathlib.*data module have to be plain"): read_checkpoint(tmp_path/'own.ckpt')
    for read in load_classifier, read_weights:
        with pytest.raises(FileNotFoundError, match=' is a folder: give a '): read(tmp_path)


def test_training_begins_with_the_weights_in_the_package(work, tmp_path, monkeypatch):
    "On images with other classes, too, and what comes of it needs these weights no more."
    monkeypatch.chdir(work)
    own = load_weights(pretrained_path('fishnet73')).state_dict()
    args = ['--data.data=shapes', '--data.batch_size=32', '--model.arch=fishnet73', '--model.arch_args=null', '--model.pretrained=true', '--model.lr=0', '--model.weight_decay=0', '--model.schedule=step',
            '--trainer.precision=32-true', '--trainer.max_epochs=1', *(f'--trainer.limit_{part}_batches=1' for part in ('train', 'val', 'test')), '--trainer.enable_progress_bar=false']
    with quiet_lightning(): folder = fit('quick', args, name='tuned')
    with monkeypatch.context() as patched:
        patched.setattr(training, 'create_model', lambda name, classes, channels, pretrained, **kwargs: create_model(name, classes, channels, **kwargs))
        classifier = load_classifier(folder/'checkpoints'/'best.ckpt')
    for name, tensor in classifier.model.named_parameters(): assert torch.equal(tensor, own[name])
    record = read_record(folder)
    assert classifier.hparams.arch_args == record['hparams']['model']['arch_args'] == read_weights(pretrained_path('fishnet73'))[1]['arch_args']
    assert record['hparams']['model']['pretrained'] and '| fishnet73 (96, 192, 384), pretrained |' in results_table([record])
    assert read_weights(export_weights(folder, tmp_path/'tuned.safetensors'))[1]['pretrained']
    for wrong in dict(pretrained=True), dict(features_only=True):
        with pytest.raises(ValueError, match=f'arch_args has no {next(iter(wrong))}'): Classifier('fishnet73', wrong)
    four = Classifier('fishnet73', num_classes=4, pretrained=True)
    assert four(torch.randn(1, 3, 32, 32)).shape == (1, 4) and torch.equal(four.model.tail.stem[0].weight, own['tail.stem.0.weight'])


def test_own_recipe_goes_on_without_its_record(work, monkeypatch):
    "As after a kill before there was one; a recipe of another name is not taken for it."
    monkeypatch.chdir(work)
    Path('v1.2.yaml').write_text(recipe_path('quick').read_text())
    args = [*TINY, '--trainer.max_epochs=1', '--trainer.limit_train_batches=1', '--model.schedule=step']
    folder = fit('v1.2.yaml', args)
    assert folder.name == read_record(folder)['recipe'] == 'v1.2'
    (folder/'record.json').unlink()
    assert fit('v1.2.yaml', ['--trainer.max_epochs=2'], resume=True) == folder
    assert read_record(folder)['recipe'] == 'v1.2' and len(read_metrics(folder/'metrics.csv')) == 2
    assert fit('v1.2', ['--trainer.max_epochs=3'], resume=True) == folder  # its record knows it
    for name, told in ('metrics.csv', 'metrics.csv lacks some of the epochs up to .*train again without --resume'), ('checkpoints/best.ckpt', 'best.ckpt is missing.*train again without --resume'):
        (folder/name).rename('aside')
        with pytest.raises(FileNotFoundError, match=told): fit('v1.2', ['--trainer.max_epochs=4'], resume=True)
        Path('aside').rename(folder/name)


def test_runs_that_start_at_once_have_a_folder_each(tmp_path):
    barrier, found = threading.Barrier(8), []
    def begin():
        barrier.wait()
        found.append(run_folder(tmp_path, 'quick', resume=False))
    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(set(found)) == 8 and all(folder.is_dir() for folder in found)


def test_commit_is_the_librarys_own(tmp_path, monkeypatch):
    "Not that of a checkout in which it was merely installed."
    for name in 'GLOBAL', 'SYSTEM': monkeypatch.setenv(f'GIT_CONFIG_{name}', os.devnull)  # which may ask for signatures
    git = ['git', '-C', tmp_path, '-c', 'user.name=x', '-c', 'user.email=x@example.org']
    for args in (['init', '-q'], ['commit', '-q', '--allow-empty', '-m', 'other']): subprocess.run([*git, *args], check=True)
    (tmp_path/'__init__.py').touch()
    monkeypatch.setattr(training, 'files', lambda name: tmp_path)
    assert code_commit() is None
    for args in (['add', '-A'], ['commit', '-q', '-m', 'its own']): subprocess.run([*git, *args], check=True)
    head = subprocess.run([*git, 'rev-parse', '--short', 'HEAD'], check=True, capture_output=True, text=True).stdout.strip()
    assert code_commit() == head
    (tmp_path/'__init__.py').write_text('changed = True\n')
    assert code_commit() == head + '+changes'


class Runs:
    "What a hostile checkpoint holds."
    def __init__(self, target: Path): self.target = target
    def __reduce__(self): return os.system, (f'touch {self.target}',)


def test_hostile_checkpoints_are_refused_and_execute_nothing(tmp_path, straight):
    trap, path = tmp_path/'executed', tmp_path/'bad.ckpt'
    good = torch.load(found := straight/'checkpoints'/'best.ckpt', weights_only=True)
    Classifier.load_from_checkpoint(found, map_location='cpu', weights_only=True)  # Lightning's way, without a trainer
    assert '_instantiator' not in good['hyper_parameters']
    last = next(name for name in reversed(good['state_dict']) if good['state_dict'][name].ndim == 2)  # the linear layer
    def with_data(**more): return {**good, 'datamodule_hyper_parameters': {**good['datamodule_hyper_parameters'], **more}}
    hostile = [{**good, 'state_dict': Runs(trap)}, Runs(trap), {**good, 'hyper_parameters': {**good['hyper_parameters'], '_instantiator': 'os.system'}},
               with_data(_instantiator='os.system'), with_data(data=Runs(trap)), {**good, 'hparams': {'_instantiator': 'os.system'}},
               {**good, 'state_dict': {1: torch.ones(1)}}, {**good, 'state_dict': {'model': 'weights'}}, {**good, 'state_dict': good['state_dict'] | {last: torch.empty_like(good['state_dict'][last], device='meta')}},
               {**good, 'hyper_parameters': {**good['hyper_parameters'], 'num_classes': 10**9}, 'state_dict': good['state_dict'] | {last: torch.zeros(1).expand(10**9, good['state_dict'][last].shape[1])}},
               {**good, 'hyper_parameters': {**good['hyper_parameters'], 'arch_args': Runs(trap)}}, {**good, 'state_dict': {}}, [], {},
               *({**good, 'hyper_parameters': {**good['hyper_parameters'], **wrong}} for wrong in (dict(num_classes=-1), dict(num_classes=0), dict(num_classes=10**12), dict(num_classes='ten'), dict(arch_args='ten'), dict(arch_args=dict(widths=[10**7, 2*10**7], tail=[1, 1])), dict(arch_args=dict(widths=[8, 16], tail=[10**9, 1]))))]
    for content in hostile:
        torch.save(content, path)
        with pytest.raises(ValueError, match='bad.ckpt'): load_classifier(path)
    with zipfile.ZipFile(found) as stored, zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist(): packed.writestr(name, stored.read(name))
    with pytest.raises(ValueError, match='bad.ckpt is refused: it is compressed'): load_classifier(path)
    with zipfile.ZipFile(found) as stored, zipfile.ZipFile(path, 'w') as packed:
        for name in stored.namelist(): packed.writestr(name, stored.read(name))
        for i in range(100):
            packed.filelist.append(copy(max(packed.filelist, key=lambda part: part.file_size)))  # the same bytes under one more name
            packed.filelist[-1].filename += f'-{i}'
    with pytest.raises(ValueError, match='bad.ckpt is refused: it says of the same bytes more than once'): load_classifier(path)
    for raw in (b'', b'no checkpoint', b'a: 1\n', b'epoch,lr\n', pickle.dumps(Runs(trap)), found.read_bytes()[:1000], found.read_bytes()[-1000:]):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match='bad.ckpt'): load_classifier(path)
    assert not trap.exists()


def test_full_disk_is_said_and_leaves_the_checkpoint(tmp_path, monkeypatch):
    from fishnet_nb.training import AtomicCheckpointIO
    io, path = AtomicCheckpointIO(), tmp_path/'last.ckpt'
    io.save_checkpoint({'state_dict': {'w': torch.ones(3)}}, path)
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='No space left on device.*what was written before is intact'): io.save_checkpoint({}, path)
    def broken(*args, **kwargs): raise RuntimeError('CUDA error: an illegal memory access was encountered')
    monkeypatch.setattr(torch, 'save', broken)
    with pytest.raises(RuntimeError, match='CUDA error'): io.save_checkpoint({}, path)  # not said to be the disk's
    assert torch.load(path)['state_dict']['w'].tolist() == [1, 1, 1] and [p.name for p in tmp_path.iterdir()] == ['last.ckpt']


@pytest.mark.skipif(not hasattr(signal, 'SIGXFSZ'), reason='no limit for the size of files here')
def test_disk_that_is_full_within_a_checkpoint_is_said(tmp_path):
    "By PyTorch's own writer, whose error is not the disk's."
    code = '''
import resource, signal, torch
from fishnet_nb.training import AtomicCheckpointIO
AtomicCheckpointIO().save_checkpoint({'state_dict': {'w': torch.ones(3)}}, 'last.ckpt')
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: AtomicCheckpointIO().save_checkpoint({'state_dict': {'w': torch.ones(1_000_000)}}, 'last.ckpt')
except OSError as error: print(error)
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert 'what was written before is intact' in done.stdout, done.stdout + done.stderr
    assert torch.load(tmp_path/'last.ckpt')['state_dict']['w'].tolist() == [1, 1, 1] and [p.name for p in tmp_path.iterdir()] == ['last.ckpt']


def test_best_checkpoint_moves_with_its_run(tmp_path):
    "What Lightning's own class says of it is read, too, and its score is kept, against which later epochs are measured."
    old, new = ModelCheckpoint(tmp_path/'old', 'best', monitor='val_loss'), MovableCheckpoint(tmp_path/'new', 'best', monitor='val_loss')
    old.best_model_path = old.kth_best_model_path = str(tmp_path/'old'/'best.ckpt')
    old.best_k_models, old.best_model_score, old.kth_value = {old.best_model_path: torch.tensor(.5)}, torch.tensor(.5), torch.tensor(.5)
    new.load_state_dict(old.state_dict())
    assert new.state_key == old.state_key and new.best_model_score == .5
    assert new.best_model_path == str(tmp_path/'new'/'best.ckpt') and list(new.best_k_models) == [new.best_model_path]


def test_run_that_never_starts_leaves_no_folder(work, monkeypatch):
    monkeypatch.chdir(work)
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(RunRecorder, 'on_fit_start', stop)
    with pytest.raises(KeyboardInterrupt): fit('quick', TINY, name='never')
    assert not (work/'results'/'never').exists()


@pytest.mark.parametrize('loss, scale', [(2.5, 'linear'), (2e4, 'log')])
def test_one_loss_far_above_the_others_does_not_flatten_the_plot(tmp_path, loss, scale):
    rows = [dict.fromkeys(COLUMNS, 1.) | dict(epoch=epoch, val_loss=loss if epoch == 1 else .5) for epoch in range(4)]
    (tmp_path/'metrics.csv').write_text('\n'.join([','.join(COLUMNS), *(','.join(str(row[column]) for column in COLUMNS) for row in rows)]))
    assert plot_history(tmp_path).axes[0].get_yscale() == scale


@pytest.mark.parametrize('stage', ['train', 'val', 'test'])
def test_an_epoch_that_was_broken_off_counts_for_nothing_afterwards(stage):
    "As by a full GPU, or by Ctrl-C in a notebook."
    classifier = Classifier('fishnet73', dict(widths=[8, 16], tail=[1, 1]))
    images = [dict(img=torch.randn(3, 8, 8), label=label) for label in range(10)]
    class Broken(DataLoader):
        def __iter__(self):
            yield next(super().__iter__())
            raise MemoryError
    whole, broken = (kind(images, batch_size=4) for kind in (DataLoader, Broken))
    def figures_of(loader: DataLoader) -> dict:
        trainer = Trainer(accelerator='cpu', logger=False, enable_progress_bar=False, enable_checkpointing=False, num_sanity_val_steps=0, max_epochs=1)
        with quiet_lightning():
            if stage == 'test': trainer.test(classifier, loader, verbose=False)
            else: trainer.fit(classifier, **{'train_dataloaders': whole, 'val_dataloaders': whole, f'{stage}_dataloaders': loader})
        return trainer.callback_metrics
    with pytest.raises(MemoryError): figures_of(broken)
    assert figures_of(whole)[f'{stage}_n'] == 10


def test_a_classifier_wants_all_classes_of_the_data(work, monkeypatch):
    monkeypatch.chdir(work)
    classifier = Classifier('fishnet73', dict(widths=[8, 16], tail=[1, 1]), num_classes=5)
    with quiet_lightning(), pytest.raises(ValueError, match='the data has 10 classes, and num_classes=5'):
        Trainer(accelerator='cpu', logger=False, enable_progress_bar=False, limit_test_batches=1).test(classifier, CIFARDataModule('shapes', num_workers=0))
