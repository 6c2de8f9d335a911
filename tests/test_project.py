"Drift between what is written twice, the wheel in an empty environment, and the site."
import json
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup
from PIL import Image

from project import BIN, ROOT, check, copy_project, make_readme, run


@pytest.fixture(scope='module')
def copy(tmp_path_factory) -> Path: return copy_project(tmp_path_factory.mktemp('copy')/'fishnet_nb')


def test_library_is_what_the_notebooks_export(copy):
    check(BIN/'nbdev_export', cwd=copy)
    changed = check('git', 'diff', '--stat', '--', 'fishnet_nb', cwd=copy) + check('git', 'ls-files', '--others', '--', 'fishnet_nb', cwd=copy)
    assert not changed, f'run `make prepare`; nbdev_export changes\n{changed}'


def test_notebooks_are_clean(copy):
    check(BIN/'nbdev_clean', cwd=copy)
    changed = check('git', 'diff', '--stat', '--', 'nbs', cwd=copy)
    assert not changed, f'run `make prepare`; nbdev_clean changes\n{changed}'


@pytest.mark.parametrize('path', sorted((ROOT/'nbs').glob('*.ipynb')), ids=lambda path: path.name)
def test_notebook_is_fit_to_be_read(path):
    cells = [cell for cell in json.loads(path.read_text(encoding='utf-8'))['cells'] if cell['cell_type'] == 'code']
    outputs = [output for cell in cells for output in cell['outputs']]
    assert path.stat().st_size < 1_000_000
    assert outputs, 'a notebook is committed with its outputs'
    assert not [o for o in outputs if o['output_type'] == 'error' or o.get('name') == 'stderr']


def test_readme_is_the_index(): assert (ROOT/'README.md').read_text(encoding='utf-8') == make_readme(ROOT), 'run `make prepare`'


def test_records_agree_with_their_metrics():
    "The figures in a record are those of its metrics.csv, so neither was changed by hand alone."
    from fishnet_nb.training import read_metrics
    records = sorted((ROOT/'results').glob('*/record.json'))
    assert records
    for path in records:
        record, rows = json.loads(path.read_text(encoding='utf-8')), read_metrics(path.with_name('metrics.csv'))
        best = min(rows, key=lambda row: row['val_loss'])
        assert (record['epochs'], record['best_epoch']) == (len(rows), best['epoch'])
        assert record['val']['top1_error'] == best['val_top1_error']
        assert record['wall_s'] == pytest.approx(sum(row['wall_s'] for row in rows), abs=.1)
        assert record['test']['n'] == record['data']['n_test']


@pytest.fixture(scope='module')
def installed(copy, tmp_path_factory) -> Path:
    "The folder of the commands of an empty environment into which the wheel alone was installed."
    folder = tmp_path_factory.mktemp('wheel')
    uv = BIN/'uv'
    check(uv, 'build', '--quiet', '--wheel', '--out-dir', folder, copy)
    check(uv, 'venv', '--quiet', '--python', BIN/'python', folder/'venv')
    wheel, = folder.glob('*.whl')
    check(uv, 'pip', 'install', '--quiet', '--python', folder/'venv'/'bin'/'python', '--constraint', ROOT/'requirements.lock', wheel)
    return folder/'venv'/'bin'


def test_wheel_works_in_an_empty_environment(installed, tmp_path):
    env = {**os.environ, 'OMP_NUM_THREADS': '2', 'FISHNET_DATA': str(tmp_path/'none')}
    command = lambda *args: check(installed/'fishnet-nb', *args, cwd=tmp_path, env=env)
    imported = 'import sys, fishnet_nb, fishnet_nb.models as m; assert "pytorch_lightning" not in sys.modules; print(fishnet_nb.__file__, m.list_models())'
    assert 'site-packages' in check(installed/'python', '-c', imported, cwd=tmp_path, env=env)
    assert '17,918,784' in command('summary', 'fishnet99')
    command('fit', 'quick', '--trainer.max_epochs=1', '--trainer.limit_train_batches=2', '--trainer.limit_val_batches=1', '--trainer.limit_test_batches=1')
    Image.new('RGB', (40, 30), 'red').save(tmp_path/'red.png')
    assert 'red.png' in command('predict', 'red.png', '--checkpoint', 'results/quick/checkpoints/best.ckpt')


@pytest.fixture(scope='module')
def site(copy) -> Path:
    "The built site."
    check(BIN/'nbdev_proc_nbs', cwd=copy)
    check(BIN/'smalldocs', 'render', '_proc', cwd=copy)
    return copy/'_docs'


def test_site_has_every_page(site):
    for path in (ROOT/'nbs').glob('*.ipynb'): assert (site/path.with_suffix('.html').name).is_file()


def test_site_has_no_broken_link(site):
    pages = {path: BeautifulSoup(path.read_text(encoding='utf-8'), 'html.parser') for path in site.rglob('*.html')}
    ids = {path: {tag['id'] for tag in page.find_all(id=True)} for path, page in pages.items()}
    broken = []
    for path, page in pages.items():
        for tag, key in [(t, k) for k in ('href', 'src') for t in page.find_all(attrs={k: True})]:
            url = urlsplit(tag[key])
            if url.scheme or url.netloc: continue
            target = (path.parent/unquote(url.path)).resolve() if url.path else path
            if target.is_dir(): target = target/'index.html'
            if not target.exists() or (url.fragment and target in ids and unquote(url.fragment) not in ids[target]): broken.append(f'{path.name}: {tag[key]}')
    assert not broken, '\n'.join(sorted(set(broken)))
