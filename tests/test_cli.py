"The command line in whole processes: typed wrongly, given broken files, stopped by Ctrl-C."
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fishnet_nb.cli import _repeatable, main
from fishnet_nb.data import CIFAR_MEAN, CIFAR_STD
from fishnet_nb.models import load_weights, read_weights, save_weights
from fishnet_nb.shapes import make_shapes, write_shapes
from fishnet_nb.testing import export_weights, load_trained
from fishnet_nb.training import NOT_FINITE, read_metrics, read_record

import runs
from project import ROOT, published

TINY = [*runs.TINY, '--trainer.limit_train_batches=5']


def command(*args: str, cwd: Path | None = None, **kwargs) -> subprocess.CompletedProcess:
    "`python -m fishnet_nb` in a process of its own, without CIFAR-10."
    return subprocess.run([sys.executable, '-m', 'fishnet_nb', *args], cwd=cwd, env=environment(), text=True, capture_output=True, timeout=120, **kwargs)


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ('FISHNET_DATA', 'FISHNET_DEBUG')} | {'OMP_NUM_THREADS': '1'}


def start(*args: str, cwd: Path) -> subprocess.Popen:
    "`python -m fishnet_nb`, still running. It heeds Ctrl-C even where the tests run in the background, which ignores it."
    return subprocess.Popen([sys.executable, '-m', 'fishnet_nb', *args], cwd=cwd, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def refused(message: str, *args: str, cwd: Path | None = None) -> None:
    "Exit code 2 and one line on stderr that begins with `error:` and holds `message`."
    done = command(*args, cwd=cwd)
    assert done.returncode == 2 and done.stdout == '', done.stdout + done.stderr
    assert re.fullmatch(r'error: [^\n]+\n', done.stderr) and message in done.stderr, done.stderr


@pytest.fixture(scope='module')
def work(tmp_path_factory) -> Path:
    "A folder with a finished run called `tiny`."
    folder = tmp_path_factory.mktemp('cli')
    (folder/'data').mkdir()
    done = command('fit', 'quick', '--name', 'tiny', '--trainer.max_epochs', '2', *TINY, cwd=folder)
    assert done.returncode == 0 and 'top-1 error' in done.stdout and 'Traceback' not in done.stderr, done.stdout + done.stderr
    return folder


@pytest.fixture
def inside(work, monkeypatch) -> Path:
    "That folder as the working folder of this process, for what needs no process of its own."
    monkeypatch.chdir(work)
    for name in ('FISHNET_DATA', 'FISHNET_DEBUG'): monkeypatch.delenv(name, raising=False)
    return work


def test_help_teaches_and_imports_nothing_heavy():
    out = command('--help').stdout
    for name in ('fit', 'test', 'predict', 'export', 'summary', 'bench', 'data', 'reproduce'):
        assert f'  {name} ' in out or f'  {name}\n' in out
        done = command(name, '--help')
        assert done.returncode == 0 and f'\nexamples:\n  fishnet-nb {name} ' in done.stdout
    assert '130' in out
    done = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'fishnet_nb', '--version'], text=True, capture_output=True)
    assert done.stdout.startswith('fishnet_nb ') and 'torch' not in done.stderr and 'numpy' not in done.stderr


@pytest.mark.parametrize('args, message', [
    ([], 'COMMAND'), (['fitt'], 'did you mean fit?'), (['xyz'], 'there are fit, test, predict, export, summary, bench, data, reproduce'), (["it's\n"], 'there is no command'),
    (['fit'], 'RECIPE'), (['--nonsense'], 'COMMAND'), (['summary'], 'MODEL'), (['summary', 'fishnet99', '--widht', '64'], 'did you mean --widths?'),
    (['summary', 'fishnet99', '--widths', '64', 'x'], "'x' is not a whole number"), (['summary', 'fishnet99', '--widths'], 'expected at least one'),
    (['summary', 'fishnet99', '--k', '0'], "'0' is not a whole number"), (['summary', 'fishnet99', '--k', '²'], 'not a whole number'),
    (['summary', 'fishnet99', 'extra'], 'unknown: extra'), (['summary', 'fishnet99', '--num', '3'], 'did you mean --num-classes?'),
    (['predict', 'a.png'], 'a.png is not there'), (['predict', '--checkpoint', 'x'], 'IMAGE'), (['export'], 'RUN'), (['bench'], 'MODEL'), (['bench', 'fishnet99', '--rounds', '0'], 'not a whole number'), (['bench', 'fishnet99', '--width-factor', '0'], 'not a number above 0'),
    (['data', '--download', '--shapes'], 'not allowed with'),
    (['reproduce', 'x', '--tolerance', 'nan'], 'from 0 to 1'), (['test', 'x', '--resume'], 'unknown: --resume')])
def test_wrongly_typed(args, message): refused(message, *args)


@pytest.mark.parametrize('args, message', [
    (['fit', 'quik'], 'did you mean'), (['fit', 'none.yaml'], 'none.yaml is missing'), (['fit', 'quick', '--trainer.max_epoch=3'], 'did you mean --trainer.max_epochs?'),
    (['fit', 'quick', '--nmae', 'x'], 'did you mean --name?'), (['fit', 'quick', '--modle.lr=1'], 'did you mean --model.lr?'), (['test', 'begun'], 'go on by `fishnet-nb fit quick --name begun --resume`'), (['test', ''], 'is empty'), (['test', 'tiny', '--data', ''], 'is empty'), (['fit', 'quick', '--model.lr=fast'], 'model.lr is fast, and has to be a number\n'), (['fit', 'quick', '--trainer.accelerator=gpus'], 'gpus'),
    (['fit', 'quick', '--lr=1'], 'did you mean --model.lr?'), (['fit', 'quick', '--epochs=3'], 'did you mean --trainer.max_epochs?'), (['fit', 'quick', '--batch-size=3'], 'did you mean --data.batch_size?'), (['fit', 'quick', '--widths=[8, 16]'], 'did you mean --model.arch_args.widths?'),
    (['fit', 'quick', '--trainer.precision=8'], "trainer.precision is 8, and has to be one of 64, 32, 16, '"), (['fit', 'quick', '--model.arch_args.k=x'], 'model.arch_args is {k: x}, and has to be one of entries as in {widths: [16, 32, 64], k: 2}, null\n'),
    (['fit', 'quick', '--data.seed=3'], 'follows from seed_everything'), (['fit', 'quick', '--num-classes=3'], 'unrecognized arguments: --num-classes=3\n'), (['fit', 'quick', '--trainer.callbacks=EarlyStopping'], 'monitor'), (['fit', 'quick', '--data.batch_size=0'], 'error: batch_size=0: a whole number'),
    (['fit', 'quick', '--data.augment=foo'], "'student', 'standard'"), (['fit', 'quick', '--model.arch=fishnet98'], 'did you mean'), (['fit', 'quick', '--name', 'never', '--resume'], 'no run to resume'),
    (['fit', 'cpu'], '--download'), (['fit', 'broken.yaml'], 'broken.yaml'), *((['fit', f'{name}.yaml'], f'{name}.yaml is no recipe') for name in ('empty', 'items', 'binary')), (['fit', 'number.yaml'], "number.yaml: data is '5'"), (['fit', 'twice.yaml'], 'twice.yaml: model, lr given twice'), (['predict', '/dev/null'], 'no plain file'),
    (['data', '--shapes', '--sheet', 'noext'], '--sheet noext'), (['data', '--shapes', '--sheet', 'broken.yaml/x.png'], 'error: broken.yaml is a file'), (['data', '--shapes', '--sheet', 'broken.yaml/sub/x.png'], 'error: broken.yaml is a file'), (['bench', 'fishnet73', '--name', ''], "--name ''"), (['bench', 'fishnet73', '--name', '../x'], 'results/bench is expected'), (['summary', 'fishnet98'], 'fishnet99'), (['summary', 'resnet50', '--k', '2'], 'no argument k'),
    (['summary', 'fishnet99', '--widths', '64', '128', '256', '511'], 'b3'), (['summary', 'fishnet99', '--input-size', '20'], '20'), (['data'], '--download'), (['data'], 'the embedded shapes are shown by --shapes'),
    (['test', 'no-such-run'], 'there are tiny'), (['test', 'kept'], 'without checkpoints'), (['test', 'garbage.ckpt'], 'garbage.ckpt'), (['test', 'results'], 'neither'),
    (['test', 'tiny', '--data', 'nowhere'], 'nowhere'), (['predict', 'x.png', '--checkpoint', 'none.ckpt'], 'none.ckpt'), (['predict', 'x.png', '--checkpoint', 'garbage.safetensors'], 'holds no weights'),
    (['bench', 'fishnet98'], 'fishnet99'), (['bench', 'fishnet99', '--width-factor', '0.01'], 'k=2 does not divide'), (['export', 'kept'], 'without checkpoints'), (['export', 'tiny', '--out', 'x.pt'], '.safetensors'), (['export', 'tiny', '--out', 'no/x.safetensors'], 'make it first'), (['reproduce', 'nothing'], 'there are begun, '),
    (['reproduce', 'garbage'], 'not a run record'), (['reproduce', 'half'], 'not a whole run record'), (['reproduce', 'list'], 'not a whole run record'),
    (['reproduce', 'nan'], 'test.top1_error is nan'), (['reproduce', 'earlier'], "'device' is missing"), (['reproduce', 'nameless'], "name is ''"), (['reproduce', 'hash'], 'data.sha256 is 5'),
    (['reproduce', 'stopped'], 'interrupted'), (['reproduce', 'otherdata'], '--other-data')])
def test_given_wrongly(inside, capsys, args, message):
    make_broken_files(inside)
    assert main(args) == 2
    found = capsys.readouterr()
    assert re.fullmatch(r'error: [^\n]+\n', found.err) and message in found.err, found.err


def make_broken_files(folder: Path) -> None:
    "Checkpoints, recipes and records that can't be used."
    for name in 'garbage.ckpt', 'garbage.safetensors': Path(name).write_bytes(b'garbage')
    Path('broken.yaml').write_text('model: {arch: [')
    for name, content in dict(empty=b'', items=b'- 1\n- 2\n', binary=b'\x80\x02\xff\x00', number=b'data: 5\n', twice=b'model: {lr: .1}\nmodel: {lr: .2, lr: .3}\n').items(): Path(f'{name}.yaml').write_bytes(content)
    record = json.loads((folder/'results'/'tiny'/'record.json').read_text())
    broken = dict(kept=record, half={'status': 'finished'}, list=[], stopped={**record, 'status': 'interrupted'}, begun={**record, 'name': 'begun', 'status': 'running'},
                  nan={**record, 'test': {**record['test'], 'top1_error': math.nan}}, earlier={**record, 'earlier': [{}]}, nameless={**record, 'name': ''}, hash={**record, 'data': {**record['data'], 'sha256': 5}},
                  otherdata={**record, 'data': {**record['data'], 'sha256': '0'*64}})
    for name, content in broken.items(): write_record(folder/'results'/name, json.dumps(content))
    write_record(folder/'results'/'garbage', '{"status": ')


def write_record(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder/'record.json').write_text(text)


def test_run_is_tested(inside, capsys):
    assert main(['test', 'results/tiny']) == 0
    out = capsys.readouterr().out
    assert 'shapes (synthetic)' in out and '27.0%' in out and 'different datasets' in out and 'Next:' in out
    for name in ('history', 'confusion', 'predictions'): assert Image.open(f'results/tiny/{name}.png').size[0] > 500
    assert not list(Path('results/tiny').glob('.*'))


def test_a_folder_that_takes_no_files_is_noticed_before_the_test(inside, capsys, monkeypatch):
    monkeypatch.setattr('fishnet_nb.testing.test_run', lambda *_: pytest.fail('the images were tested'))
    def refuse(**_): raise OSError(30, 'Read-only file system')
    monkeypatch.setattr('tempfile.TemporaryFile', refuse)
    assert main(['test', 'results/tiny']) == 2
    assert capsys.readouterr().err == 'error: results/tiny: nothing can be written there (Read-only file system)\n'


def test_weights_are_tested_as_their_run_was(inside, capsys):
    "An exported file has its run's errors; the weights in the package are shown mirror images, too, and the record of tests keeps what it has of other data."
    assert main(['export', 'tiny', '--out', 'tiny.safetensors']) == main(['test', 'tiny']) == main(['test', 'tiny.safetensors']) == 0
    (run,), (weights,) = (json.loads(path.read_text()) for path in (Path('results/tiny/test.json'), Path('test.json')))
    assert run['errors'] == weights['errors'] and run['data']['n_test'] == 1000 and list(run['errors']) == ['alone']
    (inside/'results'/'pretrained').mkdir()
    Path('results/pretrained/test.json').write_text(json.dumps([run]))
    capsys.readouterr()
    assert main(['test', '--data', 'shapes']) == 0
    out, err = capsys.readouterr()
    assert err.startswith('note: the network knows the classes airplane, ') and 'the data has circle, ' in err
    other, found = json.loads(Path('results/pretrained/test.json').read_text())
    assert other == run and list(found['errors']) == ['mirrored', 'alone']
    for errors in found['errors'].values(): assert f'{errors["top1_error"]:.1%}' in out
    Path('results/pretrained/test.json').write_text('{"mine": 1}')
    assert main(['test', '--data', 'shapes']) == 2
    found = capsys.readouterr()
    assert 'test.json is not a record of tests' in found.err and not found.out  # before it is tested
    assert Path('results/pretrained/test.json').read_text() == '{"mine": 1}'
    shutil.rmtree('results/pretrained')
    own = read_weights('tiny.safetensors')[1] | {'classes': list('abcdefghij')}
    save_weights(load_weights('tiny.safetensors'), 'own.safetensors', own)
    assert main(['test', 'own.safetensors']) == 2
    assert 'knows the classes a, b, c' in capsys.readouterr().err


def test_ctrl_c_in_the_last_test_leaves_a_run_that_can_be_resumed(inside, capsys, monkeypatch):
    "Lightning makes a SystemExit of it."
    with monkeypatch.context() as patched:
        patched.setattr('pytorch_lightning.Trainer.test', lambda *args, **kwargs: sys.exit(1))
        assert main(['fit', 'quick', '--name', 'late', '--trainer.max_epochs', '1', *TINY]) == 130
    assert 'fishnet-nb fit quick --name late --resume' in capsys.readouterr().err and read_record('late')['status'] == 'interrupted'
    assert main(['fit', 'quick', '--name', 'late', '--resume']) == 0
    assert read_record('late')['status'] == 'finished'
    shutil.rmtree('results/late')


def test_damaged_metrics_are_named(inside, capsys):
    shutil.copytree('results/tiny', 'results/damaged')
    for text in ('epoch,val_loss\n0,x\n', 'a,b\n1,2\n', 'epoch,val_loss\n0\n'):
        Path('results/damaged/metrics.csv').write_text(text)
        assert main(['test', 'damaged']) == 2
        assert 'metrics.csv is not the metrics.csv of a run' in capsys.readouterr().err
    shutil.rmtree('results/damaged')


def test_images_of_every_kind_are_predicted(inside, capsys):
    images = make_images(inside/'images')
    (inside/'images'/'text.png').write_text('no image')
    (inside/'images'/'cut.png').write_bytes((inside/'images'/'rgb.png').read_bytes()[:200])
    (inside/'images'/'empty.jpg').touch()
    checkpoint = ['--checkpoint', 'results/tiny/checkpoints/best.ckpt']
    assert main(['predict', *map(str, images), *checkpoint]) == 0
    found = capsys.readouterr()
    lines = found.out.splitlines()
    assert len(lines) == len(images) + 1 and not found.err
    assert all(str(path) in line and line.count('%') == 3 for path, line in zip(images, lines[1:]))
    bad = ['images/text.png', 'images/cut.png', 'images/empty.jpg', 'images', 'gone.png']
    assert main(['predict', *bad, str(images[0]), *checkpoint]) == 2  # the others are predicted all the same
    found = capsys.readouterr()
    assert len(found.out.splitlines()) == 2 and len(found.err.splitlines()) == len(bad)
    assert all(line.startswith(f'error: {path} ') for path, line in zip(bad, found.err.splitlines()))


def test_what_is_predicted_is_what_the_network_says(inside, capsys):
    images = [image.transpose(1, 2, 0) for image in make_shapes(4, seed=9).images]
    for i, image in enumerate(images): Image.fromarray(image).save(f'shape-{i}.png')
    assert main(['predict', *(f'shape-{i}.png' for i in range(4)), '--checkpoint', 'tiny']) == 0
    classifier, names = load_trained('results/tiny/checkpoints/best.ckpt')
    normalised = (np.stack(images)/255 - CIFAR_MEAN)/CIFAR_STD
    with torch.no_grad(): confidences = classifier(torch.tensor(normalised, dtype=torch.float32).permute(0, 3, 1, 2)).softmax(1)
    for line, told in zip(capsys.readouterr().out.splitlines()[1:], confidences, strict=True):
        assert names[told.argmax()] in line and abs(float(re.search(r'([\d.]+)%', line)[1]) - 100*told.max().item()) < .2


def make_images(folder: Path) -> list[Path]:
    "One image of each kind that a reader may have."
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    rgb, deep = Image.fromarray(pixels), Image.fromarray((pixels[..., 0].astype(np.uint16)*257))
    exif = Image.Exif()
    exif[0x112] = 6  # turned by 90°
    rgb.save(folder/'rgb.png'), rgb.save(folder/'turned.jpg', exif=exif), rgb.convert('CMYK').save(folder/'cmyk.jpg'), rgb.convert('P').save(folder/'palette.png')
    rgb.convert('RGBA').save(folder/'rgba.png'), rgb.convert('L').save(folder/'gray.png'), rgb.convert('LA').save(folder/'la.png'), rgb.convert('1').save(folder/'bits.png')
    deep.save(folder/'deep.png'), Image.fromarray(pixels[..., 0].astype(np.float32)/255).save(folder/'float.tiff'), rgb.resize((1, 1)).save(folder/'pixel.png')
    rgb.resize((3000, 20)).save(folder/'wide.png'), rgb.save(folder/'moving.gif', save_all=True, append_images=[rgb.rotate(90)])
    Image.new('L', (10000, 9500)).save(folder/'huge.png'), rgb.save(folder/'ünï cödé.webp')
    return sorted(folder.glob('*'))


def test_the_same_image_in_other_modes_is_read_alike(tmp_path):
    from fishnet_nb.cli import _read_image
    gray = Image.fromarray(np.random.default_rng(1).integers(0, 200, (32, 32), np.uint8))
    deep, floating = Image.fromarray(np.asarray(gray).astype(np.uint16)*257), Image.fromarray(np.asarray(gray).astype(np.float32)/255)
    for name, image in ('gray.png', gray), ('rgb.png', gray.convert('RGB')), ('rgba.png', gray.convert('RGBA')), ('deep.png', deep), ('float.tiff', floating):
        image.save(tmp_path/name)
        np.testing.assert_allclose(_read_image(tmp_path/name)[..., 0], np.asarray(gray), atol=1, err_msg=name)
    clear = gray.convert('RGBA')
    clear.putalpha(0)
    clear.save(tmp_path/'clear.png')
    assert (_read_image(tmp_path/'clear.png') == 255).all()
    turned, exif = Image.new('RGB', (64, 32), 'black'), Image.Exif()
    turned.paste('white', (0, 0, 32, 32))
    exif[0x112] = 3  # upside down
    turned.save(tmp_path/'turned.png', exif=exif)
    assert _read_image(tmp_path/'turned.png')[16, 2].max() < 50 and _read_image(tmp_path/'turned.png')[16, 29].min() > 200


def test_summary_and_data(inside, capsys):
    assert main(['summary', 'fishnet99']) == 0
    assert '17,918,784 parameters; 2.53 GFLOPs' in capsys.readouterr().out
    assert main(['data', '--shapes', '--sheet', 'new/sheet.png']) == 0
    out = capsys.readouterr().out
    assert re.search(r'^all +5,000 +1,000$', out, flags=re.M)
    assert re.search(r'SHA-256 of images and labels: [0-9a-f]{64}\n', out) and Image.open('new/sheet.png').size[0] > 300
    assert main(['data', '--shapes', '--sheet', 'sheet.xyz']) == 2 and not list(inside.glob('*sheet*'))


def test_download_says_that_other_commands_read_other_data(inside, capsys, monkeypatch):
    monkeypatch.setattr('fishnet_nb.data.download_cifar', lambda root: write_shapes(inside/'fetched', 100, 20))
    assert main(['data', '--download', '--sheet', 'fetched.png']) == 0 and 'FISHNET_DATA' not in capsys.readouterr().out
    shutil.rmtree(inside/'fetched')
    monkeypatch.setenv('FISHNET_DATA', 'elsewhere')
    assert main(['data', '--download', '--sheet', 'fetched.png']) == 0 and 'FISHNET_DATA is set to elsewhere' in capsys.readouterr().out


def test_a_record_is_reproduced(inside, capsys):
    assert main(['reproduce', 'tiny', '--tolerance', '0']) == 0
    assert 'reproduced: the top-1 errors differ by' in capsys.readouterr().out
    assert read_record('tiny-reproduced')['test'] == read_record('tiny')['test']
    shutil.rmtree('results/tiny-reproduced')
    record = json.loads(Path('results/tiny/record.json').read_text())
    write_record(inside/'results'/'other', json.dumps({**record, 'name': 'other', 'data': {**record['data'], 'sha256': '0'*64}, 'test': {**record['test'], 'top1_error': 0.}}))
    assert main(['reproduce', 'other', '--other-data', '--tolerance', '0.01']) == 1
    found = capsys.readouterr()
    assert 'not reproduced' in found.out and 'note: other was trained on' in found.err


def test_a_reproduction_goes_on_where_it_stopped(inside, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr('pytorch_lightning.Trainer.test', lambda *args, **kwargs: sys.exit(1))
        assert main(['reproduce', 'tiny', '--tolerance', '1']) == 130
    told = re.search(r'go on by: fishnet-nb (reproduce tiny --tolerance 1 --name (tiny-reproduced\S*) --resume)\n', capsys.readouterr().err)
    assert told and read_record(told[2])['status'] == 'interrupted'
    assert main(told[1].split()) == 0 and f'the new record is in results/{told[2]}' in capsys.readouterr().out
    record = read_record(told[2])
    hparams = record['hparams']
    others = hparams | dict(seed_everything=7), hparams | dict(trainer=hparams['trainer'] | dict(gradient_clip_val=1.)), hparams | dict(model={key: value for key, value in hparams['model'].items() if key != 'schedule'})
    for other in others:
        write_record(inside/'results'/'other', json.dumps(record | dict(name='other', hparams=other)))
        for name in told[2], f'results/{told[2]}':
            assert main(['reproduce', 'other', '--name', name, '--resume']) == 2
            assert f'results/{told[2]} has other hyperparameters than other' in capsys.readouterr().err
    older = record | dict(name='older', hparams=hparams | dict(model={key: value for key, value in hparams['model'].items() if key != 'pretrained'}))
    write_record(inside/'results'/'older', json.dumps(older))  # of the time before there was such a thing
    assert main(['reproduce', 'older', '--name', told[2], '--resume']) == 0
    assert main(['reproduce', 'tiny', '--name', 'tiny', '--resume']) == 2 and 'results/tiny is the run that is to be reproduced' in capsys.readouterr().err
    assert main(['reproduce', 'tiny', '--name', 'never', '--resume']) == 2 and 'no run to resume in results/never' in capsys.readouterr().err
    shutil.rmtree(f'results/{told[2]}')


def test_a_run_that_stopped_is_reproduced_if_it_stops_again(inside, capsys):
    record = read_record('tiny')
    stopped = {key: value for key, value in record.items() if key not in ('test', 'val', 'best_epoch')} | dict(name='stopped', status=NOT_FINITE)
    write_record(inside/'results'/'finite', json.dumps(stopped))
    assert main(['reproduce', 'finite']) == 1 and 'not reproduced: the run was stopped' in capsys.readouterr().out
    write_record(inside/'results'/'infinite', json.dumps(stopped | dict(hparams=record['hparams'] | dict(model=record['hparams']['model'] | dict(lr=1e30)))))
    assert main(['reproduce', 'infinite']) == 0 and 'reproduced: the loss is no longer finite' in capsys.readouterr().out


@pytest.mark.parametrize('named', [dict(callbacks='evil.X'), dict(callbacks=[{'class_path': 'evil.X'}]), dict(profiler={'class_path': 'evil.X', 'init_args': {}}), dict(strategy='evil.X'), dict(callbacks='{"class_path": "evil.X"}'), dict(callbacks='./evil.yaml'), dict(callbacks='/tmp/evil'), dict(callbacks='evil-too'), {'callbacks+': 'evil.X'}, {'callbacks.class_path': 'evil.X'},
                                   dict(callbacks=[{'class_path': 'pytorch_lightning.callbacks.LambdaCallback', 'init_args': {'on_fit_start': 'evil.x'}}])])
def test_a_record_brings_no_code(inside, capsys, monkeypatch, named):
    "`reproduce` imports nothing that a record names, but Lightning's callbacks."
    Path('evil.py').write_text('open("executed", "w")')
    for name in 'evil.yaml', 'evil-too': Path(name).write_text('class_path: evil.X')
    monkeypatch.syspath_prepend(inside)
    record = read_record('tiny')
    write_record(inside/'results'/'evil', json.dumps(record | dict(hparams=record['hparams'] | dict(trainer=record['hparams']['trainer'] | named))))
    assert main(['reproduce', 'evil']) == 2 and re.match('error: evil is refused: (it names|trainer has no) .*(evil|callbacks)', capsys.readouterr().err)
    assert not Path('executed').exists()


def test_all_that_a_record_names_is_repeated():
    record = read_record(Path(__file__).parent.parent/'results'/'quick')
    saved = dict(default_root_dir='./x.y', logger={'class_path': 'pytorch_lightning.loggers.CSVLogger', 'init_args': {'save_dir': 'logs/x'}})  # no code
    assert saved.items() <= _repeatable(record | {'hparams': record['hparams'] | {'trainer': record['hparams']['trainer'] | saved}}, 'quick')[2]['trainer'].items()
    averaged = [{'class_path': 'pytorch_lightning.callbacks.EMAWeightAveraging', 'init_args': {'decay': .9}}]
    hparams = record['hparams'] | {'trainer': record['hparams']['trainer'] | {'callbacks': averaged}}
    assert _repeatable(record | {'hparams': hparams}, 'quick')[2]['trainer']['callbacks'] == averaged
    hparams = record['hparams'] | {'trainer': record['hparams']['trainer'] | {'devices': 'auto'}}  # of the machine that it was made on
    for device, meant in (record['device'], '1'), ('4 × NVIDIA H100, bf16-mixed', '4'): assert _repeatable(record | {'device': device, 'hparams': hparams}, 'quick')[2]['trainer']['devices'] == meant
    for said, meant in (False, 'none'), (True, 'student'), ('standard', 'standard'):  # the first records say whether, not which
        hparams = record['hparams'] | {'data': record['hparams']['data'] | {'augment': said}}
        assert _repeatable(record | {'hparams': hparams}, 'quick')[2]['data']['augment'] == meant


def test_all_published_runs_can_be_repeated():
    "But one, of an option that was given up; the page on results says how that is repeated."
    root, paths = ROOT/'results', published('results/**/record.json')
    for path in paths:
        name = path.parent.relative_to(root).as_posix()
        if name != 'trials/cpu-half-size': _repeatable(read_record(path), name)
    with pytest.raises(ValueError, match='model has no half_size_epochs here; the run was made at commit'): _repeatable(read_record(root/'trials'/'cpu-half-size'), 'it')
    assert len(paths) > 20


def test_weights_are_exported_with_the_record_of_their_run(inside):
    "Not with that of another folder of the same name, as records are published, without checkpoints."
    ours = read_record('results/tiny')
    write_record(inside/'tiny', json.dumps(ours | {'seed': 7, 'test': ours['test'] | {'top1_error': 0.}}))
    assert main(['export', 'tiny', '--out', 'ours.safetensors']) == 0
    shutil.rmtree(inside/'tiny')
    with pytest.raises(ValueError, match='name a run, its folder or its checkpoints/best.ckpt'): export_weights('results/tiny/checkpoints/last.ckpt', 'last.safetensors')
    about = read_weights('ours.safetensors')[1]
    assert (about['seed'], about['test']) == (ours['seed'], ours['test'])


def test_weights_are_halved(inside, capsys):
    "Rounded to float16 in the file and given back in float32; those that float16 can't hold are refused, and nothing is written."
    assert main(['export', 'tiny', '--out', 'full.safetensors']) == main(['export', 'tiny', '--half', '--out', 'half.safetensors']) == 0
    (full, about), (half, about_half) = map(read_weights, ('full.safetensors', 'half.safetensors'))
    assert about == about_half and {tensor.dtype for tensor in half.values()} == {torch.float16, torch.int64}
    loaded = load_weights('half.safetensors').state_dict()
    for name, tensor in full.items(): assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], half[name].to(tensor.dtype)) and torch.equal(half[name], tensor.to(half[name].dtype))
    assert main(['test', 'half.safetensors']) == 0
    shutil.copytree('results/tiny', 'results/large')
    path = Path('results/large/checkpoints/best.ckpt')
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['state_dict']['model.tail.stem.0.weight'][0] = 1e5
    torch.save(checkpoint, path)
    capsys.readouterr()
    assert main(['export', 'large', '--half', '--out', 'large.safetensors']) == 2 and 'more than float16 holds: export them in full' in capsys.readouterr().err
    assert not Path('large.safetensors').exists()
    assert main(['export', 'large', '--out', 'large.safetensors']) == 0
    shutil.rmtree('results/large')


def test_run_is_named_alike_everywhere(inside, capsys):
    "By its name, its folder or its checkpoint; and the pictures of what isn't a run's have its name, for others may lie beside it."
    Image.new('RGB', (32, 32), 'red').save('here.png')
    for run in 'tiny', 'results/tiny', 'results/tiny/checkpoints/best.ckpt':
        assert main(['predict', 'here.png', '--checkpoint', run]) == 0
        assert main(['export', run, '--out', 'mine.safetensors']) == 0
    assert main(['export', 'results/tiny/checkpoints/last.ckpt']) == 2 and 'name a run, its folder or its checkpoints/best.ckpt' in capsys.readouterr().err
    assert main(['predict', 'here.png', '--checkpoint', 'nothing']) == 2 and 'neither a checkpoint nor a run' in capsys.readouterr().err
    (inside/'results'/'no-step-yet').mkdir()
    shutil.copy('results/tiny/config.yaml', 'results/no-step-yet')
    assert main(['test', 'no-step-yet']) == 2 and 'go on by its `fishnet-nb fit` with --name no-step-yet --resume' in capsys.readouterr().err
    shutil.rmtree('results/no-step-yet')
    Path('predictions.png').write_text('mine')
    assert main(['test', 'mine.safetensors']) == 0 and 'mine-predictions.png' in capsys.readouterr().out
    assert Path('predictions.png').read_text() == 'mine' and Image.open('mine-confusion.png').size[0] > 300
    assert main(['test', 'results/tiny']) == 0 and 'this run ' in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in Path('results/tiny').glob('*.png')}
    assert main(['test', 'results/tiny/checkpoints/last.ckpt']) == 0
    out = capsys.readouterr().out
    assert 'last.ckpt ' in out and 'the pictures last-confusion.png, last-predictions.png beside it' in out
    assert before == {path.name: path.read_bytes() for path in Path('results/tiny').glob('*.png') if not path.name.startswith('last-')}


def test_bench_writes_its_record_and_its_plot(inside, capsys, monkeypatch):
    from fishnet_nb import bench
    monkeypatch.setattr(bench, 'compile_problem', lambda device: 'no compiler')  # compiling takes minutes
    monkeypatch.setattr(bench, 'has_fast_bf16', lambda accelerator: False)
    assert main(['bench', 'fishnet73', '--widths', '8', '16', '--tail', '1', '1', '--width-factor', '1', '2', '--batch-size', '4', '--rounds', '1', '--name', 'tiny']) == 0
    found = capsys.readouterr().out
    record = bench.read_bench('results/bench/tiny.json')
    assert record['input']['data'] == 'shapes (synthetic)' and 'Of shapes (synthetic), ' in found
    assert 'Nothing is compiled: no compiler.' in found and {row['setting'] for row in record['rows']} == {bench.BASELINE.name, 'channels last'}
    assert bench.bench_report(record) in found and 'is the bottleneck' in found and 'results/bench/tiny.png' in found
    assert [(row['width'], row['mode'], row['setting']) for row in record['rows'][::3]] == [(8, 'training', 'baseline'), (8, 'inference', 'channels last'), (16, 'inference', 'baseline')]
    assert Image.open('results/bench/tiny.png').size[0] > 500
    def end(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(bench, '_memory_mb', end)  # in the first of what is measured
    assert main(['bench', 'fishnet73', '--widths', '8', '16', '--tail', '1', '1', '--batch-size', '4', '--rounds', '1', '--name', 'stopped']) == 130
    assert not Path('results/bench/stopped.json').exists()
    measured = iter([[dict(mode='training', batch_size=4, setting=bench.BASELINE.name, img_per_s=1., ratio=1., memory_mb=1.)]])
    def once(*args): return next(measured, None) or end()
    monkeypatch.setattr(bench, '_measure', once)
    assert main(['bench', 'fishnet73', '--widths', '8', '16', '--tail', '1', '1', '--batch-size', '4', '8', '--rounds', '1', '--name', 'stopped']) == 130
    assert [row['batch_size'] for row in bench.read_bench('results/bench/stopped.json')['rows']] == [4]  # what was measured is kept
    assert main(['bench', 'fishnet73', '--width-factor', '1', '1.001']) == 2 and 'as many channels' in capsys.readouterr().err


def test_ctrl_c_leaves_a_run_that_the_printed_command_resumes(work):
    args = ['fit', 'quick', '--name', 'tiny', '--trainer.max_epochs=500', '--model.schedule=step', '--model.lr=0.001', *TINY]  # the name is taken: this run is tiny-2
    process = start(*args, cwd=work)
    runs.wait_until(lambda: process.poll() is not None or (work/'results'/'tiny-2'/'checkpoints'/'last.ckpt').exists(), .05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in err, err
    told = re.search(r'go on by: fishnet-nb (fit quick --name tiny-2 --resume)\n', err)
    assert told, err
    assert json.loads((work/'results'/'tiny-2'/'record.json').read_text())['status'] == 'interrupted'
    trained = len(read_metrics(work/'results'/'tiny-2'/'metrics.csv'))
    done = command(*told[1].split(), f'--trainer.max_epochs={trained + 1}', cwd=work)
    assert done.returncode == 0 and 'epoch 1/' not in done.stdout, done.stdout + done.stderr
    assert len(read_metrics(work/'results'/'tiny-2'/'metrics.csv')) == trained + 1


def test_ctrl_c_before_there_is_anything_to_resume(tmp_path):
    "Even where a module that is being imported swallows it, as some do."
    swallow = """if True:
        import os, signal, sys, time
        from fishnet_nb.cli import main
        class Swallowing:
            def find_spec(name, *_):
                if name != 'torchmetrics': return
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(1)
                except BaseException: pass
        sys.meta_path.insert(0, Swallowing)
        sys.exit(main(['fit', 'quick']))"""
    done = subprocess.run([sys.executable, '-c', swallow], cwd=tmp_path, env=environment(), text=True, capture_output=True, timeout=60,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert (done.returncode, done.stdout, done.stderr) == (130, '', '\nstopped; nothing was begun yet\n')


def test_output_may_be_cut_off():
    done = piped('summary fishnet73 | true')
    assert done.returncode == 0 and done.stderr == ''


def piped(commands: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    "`python -m fishnet_nb` with that behind it, in a shell that reports its exit code."
    return subprocess.run(f'set -o pipefail; {shlex.quote(sys.executable)} -m fishnet_nb {commands}', shell=True, executable='/bin/bash', text=True, capture_output=True, env=environment(), cwd=cwd)


def test_run_whose_output_is_cut_off_says_how_to_go_on(work):
    args = f'--trainer.max_epochs=500 {" ".join(map(shlex.quote, TINY))}'
    assert piped(f'fit quick --name silent {args} 2>&1 | head -1', work).returncode == 130
    done = piped(f'fit quick --name cut {args} | head -1', work)
    assert done.returncode == 130 and done.stdout.startswith('epoch 1/500'), done.stderr
    assert re.search(r'stopped after \d+ epochs; go on by: fishnet-nb fit quick --name cut --resume\n$', done.stderr)
    assert read_record(work/'results'/'cut')['status'] == 'interrupted'
