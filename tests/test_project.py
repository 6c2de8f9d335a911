"Drift between what is written twice, and the wheel in an empty environment."
import json
import os
import re
import statistics
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from project import BIN, ROOT, check, copy_project, make_readme, published, run


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
    first, *others = json.loads(path.read_text(encoding='utf-8'))['cells']
    alone = [''.join(cell['source']) for cell in others if cell['cell_type'] == 'markdown']
    assert not [text for text in alone if text.startswith('#') and '\n' in text], 'a heading has a cell of its own'
    cells = [cell for cell in [first, *others] if cell['cell_type'] == 'code']
    outputs = [output for cell in cells for output in cell['outputs']]
    assert path.stat().st_size < 1_000_000
    assert outputs, 'a notebook is committed with its outputs'
    assert not [o for o in outputs if o['output_type'] == 'error' or o.get('name') == 'stderr']
    assert not [o for o in outputs if 'application/vnd.jupyter.widget-view+json' in o.get('data', {})], 'a widget shows nothing without its kernel'
    assert 'widgets' not in json.loads(path.read_text(encoding='utf-8'))['metadata'], 'what is left of progress bars'
    assert any("if 'google.colab' in str(get_ipython())" in ''.join(cell['source']) for cell in cells), 'each page can be opened in Colab, which installs the project first'


def test_notebook_with_fields_ends_when_it_is_run_as_a_whole(copy):
    "`jupyter nbconvert` waited for ever for the cell with fields: an Output widget, as `interact` has, can lose the kernel's answer."
    check(BIN/'jupyter', 'nbconvert', '--to', 'notebook', '--execute', '--stdout', '--ExecutePreprocessor.timeout=120', 'nbs/05_channels.ipynb', cwd=copy)


def test_both_editions_of_the_review_share_cells_and_equations():
    english, korean = (json.loads((ROOT/'nbs'/name).read_text(encoding='utf-8'))['cells'] for name in ('00_review.ipynb', '00_review_ko.ipynb'))
    headings = [''.join(cell['source']) for cell in english]
    english = english[:headings.index('## The functions that draw')]  # a reference of the module, which the English edition exports
    def sources(cells, kind): return [''.join(cell['source']) for cell in cells if cell['cell_type'] == kind]
    def without_alt(code): return re.sub(r'^#\| fig-alt: .+', '#| fig-alt:', code, flags=re.M)  # each edition describes its pictures in its own language
    def examples(cells): return [without_alt(code) for code in sources(cells, 'code') if not re.search(r'^#\| (export|default_exp)|^from fishnet_nb', code, flags=re.M)]
    def equations(cells): return re.findall(r'\$\$.*?\$\$', '\n'.join(sources(cells, 'markdown')), flags=re.S)
    assert examples(english) == examples(korean) and equations(english) == equations(korean)
    assert len(equations(english)) == 10  # (1) to (9), and (8) put right
    assert [text.count('](') for text in sources(english, 'markdown')] == [text.count('](') for text in sources(korean, 'markdown')]  # the same links


def test_nothing_large_and_no_data_is_committed():
    known = [name for name in check('git', 'ls-files', '-z').split('\0') if (ROOT/name).is_file()]
    assert max((ROOT/name).stat().st_size for name in known) < 10e6
    assert [name for name in known if name.startswith('data/')] == ['data/README.md']


@pytest.mark.parametrize('given', ['', 'somewhere'])
def test_make_run_sums_up_trains_and_tests_the_network_of_quick(tmp_path, given):
    "By a stand-in for the command, which notes its arguments."
    from fishnet_nb.cli import make_parser
    from fishnet_nb.training import recipe_path
    copy = copy_project(tmp_path/'copy')
    (copy/'.venv'/'bin').mkdir(parents=True)
    command = copy/'.venv'/'bin'/'fishnet-nb'
    command.write_text('#!/bin/sh\necho "$@" >> said\nmkdir -p results/run\n: > results/run-images.png\n')
    command.chmod(0o755)
    (copy/'.venv'/'.installed').touch()
    check('make', 'run', cwd=copy, env={**os.environ, 'FISHNET_DATA': given})
    (data, _), (summary, _), (fit, changes), (test, _) = (make_parser().parse_known_args(line.split()) for line in (copy/'said').read_text().splitlines())
    quick = yaml.safe_load(recipe_path('quick').read_text(encoding='utf-8'))['model']
    assert (summary.model, dict(widths=summary.widths, tail=summary.tail, k=summary.k)) == (quick['arch'], {key: quick['arch_args'][key] for key in ('widths', 'tail', 'k')})
    assert (fit.recipe, fit.name, test.tested, data.shapes) == ('quick', 'run', 'results/run', not given)
    assert ('--data.data=cifar10' in changes) == bool(given) and (copy/'results'/'run'/'images.png').is_file()


def test_version_is_the_same_wherever_it_stands():
    from fishnet_nb import __version__
    for path, text in ('settings.ini', f'version = {__version__}\n'), ('CITATION.cff', f'version: {__version__}\n'), ('README.md', f'version = {{{__version__}}},\n'):
        assert text in (ROOT/path).read_text(encoding='utf-8'), path


def test_readme_is_the_index(): assert (ROOT/'README.md').read_text(encoding='utf-8') == make_readme(ROOT), 'run `make prepare`'


def test_records_agree_with_their_metrics():
    "The figures in a record are those of its metrics.csv, so neither was changed by hand alone; and each finished run has a row in a table."
    from fishnet_nb.training import read_metrics, results_table
    records = published('results/**/record.json')
    assert records
    for path in records:
        record, rows = json.loads(path.read_text(encoding='utf-8')), read_metrics(path.with_name('metrics.csv'))
        assert record['epochs'] == len(rows)
        if record['status'] != 'finished': continue  # its loss was not finite: no best epoch and no test
        assert f'| {record["name"]} | ' in results_table([record])
        best = min(rows, key=lambda row: row['val_loss'])
        assert record['best_epoch'] == best['epoch']
        assert record['val']['top1_error'] == best['val_top1_error']
        assert record['wall_s'] == pytest.approx(sum(row['wall_s'] for row in rows), abs=.1)
        assert record['test']['n'] == record['data']['n_test']


def test_pages_state_what_the_records_say():
    "The table of results on each page that has one is the one made of the records as they are now."
    from fishnet_nb.training import read_record, results_table
    table = results_table([read_record(path) for path in published('results/*/record.json')])
    assert len(table.splitlines()) > 2
    assert table in (ROOT/'README.md').read_text(encoding='utf-8')
    for name in 'index', '07_training', '09_results':
        outputs = [output for cell in json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text(encoding='utf-8'))['cells'] for output in cell.get('outputs', [])]
        assert any(''.join(output.get('data', {}).get('text/markdown', '')).strip() == table for output in outputs), name


def test_page_of_results_has_the_thin_runs_and_the_trials():
    from fishnet_nb.training import read_record, results_table
    cells = json.loads((ROOT/'nbs/09_results.ipynb').read_text(encoding='utf-8'))['cells']
    tables = [''.join(output.get('data', {}).get('text/markdown', '')).strip() for cell in cells for output in cell.get('outputs', [])]
    assert results_table([read_record(ROOT/'results/thin'/name) for name in ('student-thin', 'student-thin-resnet50')]) in tables
    for name in 'cpu', 'thin/student-recipe', 'thin/student-recipe-averaged', 'thin/student-recipe-onecycle', 'thin/student-recipe-onecycle-standard', 'thin/student-recipe-sgd', *(f'thin/student-recipe-sgd-{part}' for part in ('mirror', '40', '47500', 'batch-100')):
        record = read_record(ROOT/'results'/name)
        ending = f'| {record["val"]["top1_error"]:.1%} | {record["test"]["top1_error"]:.1%} | {record["test"]["top5_error"]:.1%} | {record["wall_s"]/60:.1f} min |'
        assert any(line.startswith(f'| {Path(name).name} |') and line.endswith(ending) for table in tables for line in table.splitlines()), name
    for name in 'cpu', 'trials/cpu-four-stages', 'trials/cpu-half-size', 'trials/cpu-18-epochs':
        record = read_record(ROOT/'results'/name)
        ending = f'| {record["val"]["top1_error"]:.1%} | {record["test"]["top1_error"]:.1%} | {record["wall_s"]/60:.1f} min |'
        assert any(line.startswith(f'| {Path(name).name} |') and line.endswith(ending) for table in tables for line in table.splitlines()), name
    for name in (f'{recipe}{seed}' for recipe in ('cpu', 'cpu-wide') for seed in ('', '-seed-43', '-seed-44')):
        record = read_record(ROOT/'results'/name)
        row = f'| {record["params"]/1e6:.2f} M | {record["flops"]/1e6:.0f} | ', f'| {record["val"]["top1_error"]:.1%} | {record["test"]["top1_error"]:.1%} | {record["test"]["top5_error"]:.1%} | {record["wall_s"]/60:.1f} min |'
        assert any(line.startswith(f'| {name} {row[0]}') and row[1] in line for table in tables for line in table.splitlines()), name


def test_page_of_results_has_the_student_run_beside_what_is_handed_down():
    from fishnet_nb.training import read_record
    text, record = (ROOT/'nbs/09_results.ipynb').read_text(encoding='utf-8'), read_record(ROOT/'results/student')
    assert (record['hparams']['model']['arch'], record['epochs']) == ('fishnet99', 30)
    for name, told, key in ('top-1', '27.0', 'top1_error'), ('top-5', '1.7', 'top5_error'): assert f'| {name} error | {told} % | {100*record["test"][key]:.1f} % |' in text
    front = (ROOT/'nbs/index.ipynb').read_text(encoding='utf-8')
    assert f'ends at {100*record["test"]["top1_error"]:.1f} % and {100*record["test"]["top5_error"]:.1f} %' in front


def test_page_of_results_has_the_runs_of_best():
    from fishnet_nb.training import read_metrics, read_record
    text, folder = (ROOT/'nbs/09_results.ipynb').read_text(encoding='utf-8'), ROOT/'results/trials/best-four-epochs'
    for row in read_metrics(folder/'metrics.csv'): assert f'| {row["epoch"] + 1} | {row["train_loss"]:.2f} | {row["val_top1_error"]:.1%} |' in text
    assert f'{read_record(folder)["test"]["top1_error"]:.1%} are wrong' in text
    record, rows = read_record(ROOT/'results/trials/best-stem-stride-2'), read_metrics(ROOT/'results/trials/best-stem-stride-2/metrics.csv')
    row = next(line for line in text.splitlines() if line.strip().startswith('"| best-stem-stride-2 |'))
    assert f'| {1 - rows[-1]["train_f1"]:.1%} | {record["val"]["top1_error"]:.1%} | {record["test"]["top1_error"]:.1%} | {record["test"]["top5_error"]:.1%} |' in row


def test_pages_have_best_in_full_width():
    "Its errors, its rate in training, and what averages of its weights did in a thin network."
    from fishnet_nb.training import read_metrics, read_record
    pages = {name: (ROOT/f'nbs/{name}.ipynb').read_text(encoding='utf-8') for name in ('index', '01_data', '09_results', '10_speed')}
    record, rows = read_record(ROOT/'results/best'), read_metrics(ROOT/'results/best/metrics.csv')
    test, rate = record['test'], statistics.median(row['img_per_s'] for row in rows[1:])
    assert f'ends at {100*test["top1_error"]:.1f} % and {100*test["top5_error"]:.1f} %' in pages['index']
    assert f'| {record["val"]["top1_error"]:.1%} | {test["top1_error"]:.1%} | {test["top5_error"]:.1%} | {record["wall_s"]/60:.0f} min |' in pages['09_results']
    assert f'wrong about {100*(1 - rows[-1]["train_f1"]):.1f} % of its training images, shifted and cut;' in pages['09_results']
    assert f'took {round(rate, -2):,.0f}' in pages['10_speed'] and f'on {round(rate, -2):,.0f} a second' in pages['01_data']
    for name in 'best-thin', 'best-thin-averaged', 'best-thin-averaged-short':
        errors = [row['val_top1_error'] for row in read_metrics(ROOT/'results/trials'/name/'metrics.csv')]
        row = next(line for line in pages['09_results'].splitlines() if line.strip().startswith(f'"| {name} |'))
        assert ' | '.join(f'{errors[epoch - 1]:.1%}' for epoch in (5, 10, 15, 20)) in row


def test_page_of_results_has_each_short_run():
    "The row of each run beside `all` has the validation error of its record and the difference to that of `all` with its seed, or says why it stopped."
    text = (ROOT/'nbs/09_results.ipynb').read_text(encoding='utf-8')
    records = {path.parent.name: json.loads(path.read_text(encoding='utf-8')) for path in (ROOT/'results/ingredients').glob('*/record.json')}
    assert {'all', 'all-seed-43'} < set(records)
    for name, record in records.items():
        seed = '-seed-43' if name.endswith('-seed-43') else ''
        row = next(line for line in text.splitlines() if line.strip().startswith(f'"| {name.removesuffix(seed)} |'))
        if record['status'] != 'finished': assert record['status'] in row
        else:
            error, before = record['val']['top1_error'], records['all' + seed]['val']['top1_error']
            assert f'| {error:.1%} | {100*(error - before):+.1f} |' in row


def test_page_of_speed_has_each_benchmark():
    from fishnet_nb.bench import bench_report, read_bench
    cells = json.loads((ROOT/'nbs/10_speed.ipynb').read_text(encoding='utf-8'))['cells']
    shown = {''.join(output.get('data', {}).get('text/markdown', '')).strip() for cell in cells for output in cell.get('outputs', [])}
    assert (paths := published('results/bench/*.json'))
    for path in paths: assert f'**{path.stem}**: {bench_report(read_bench(path))}' in shown, path


def test_pages_state_the_errors_of_the_weights_and_of_the_seeds():
    pages = {name: (ROOT/'nbs'/f'{name}.ipynb').read_text(encoding='utf-8') for name in ('08_testing', '09_results')}
    digest = (ROOT/'fishnet_nb/weights/SHA256SUMS').read_text().split()[0]
    ours = 'CIFAR-10 (JPEG re-encoding)', 'CIFAR-10 (bit-exact subset)'  # a reader's tests on other data come beside them
    tested = [entry for entry in json.loads((ROOT/'results/pretrained/test.json').read_text(encoding='utf-8')) if entry['tested_sha256'] == digest and entry['data']['description'] in ours]
    assert len(tested) == 2
    for entry in tested:
        for how, e in entry['errors'].items(): assert f'| {entry["data"]["description"]} | {entry["data"]["n_test"]:,} | {how} | {e["top1_error"]:.1%} | {e["top5_error"]:.1%} |' in pages['08_testing']
    for name in 'cpu', 'cpu-wide', 'cpu-resnet':
        errors = [100*json.loads((ROOT/'results'/run/'record.json').read_text(encoding='utf-8'))['test']['top1_error'] for run in (name, f'{name}-seed-43', f'{name}-seed-44')]
        assert f'{name}, {len(errors)} seeds, top1_error: {statistics.mean(errors):.2f} % on average, standard deviation {statistics.stdev(errors):.2f}' in pages['09_results']


def test_page_of_results_has_the_resnet_that_costs_as_much():
    from fishnet_nb.training import read_record
    text = (ROOT/'nbs/09_results.ipynb').read_text(encoding='utf-8')
    for name in 'cpu-tail', 'cpu-shortcut', 'cpu-shortcut-seed-43', *(f'{name}{seed}' for name in ('cpu', 'cpu-resnet') for seed in ('', '-seed-43', '-seed-44')):
        record = read_record(ROOT/'results'/name)
        row = f'| {record["params"]/1e6:.2f} M | {record["flops"]/1e6:.0f} | {record["seed"]} | ', f'| {record["val"]["top1_error"]:.1%} | {record["test"]["top1_error"]:.1%} | {record["test"]["top5_error"]:.1%} |'
        assert any(f'"| {name} | ' in line and all(part in line for part in row) for line in text.splitlines()), name


def test_page_of_results_has_the_proposals():
    "The two rows of each network have the test and validation errors of its seeds."
    text = (ROOT/'nbs/09_results.ipynb').read_text(encoding='utf-8')
    records = [json.loads(path.read_text(encoding='utf-8')) for path in published('results/proposals/*/record.json')]
    names = {record['name'].split('-seed-')[0] for record in records}
    assert len(names) == 5 and len(records) == 10
    for name in names:
        rows = text.splitlines()
        first = next(i for i, line in enumerate(rows) if line.strip().startswith(f'"| {name} |'))
        for row, part, images in (rows[first], 'test', 'test'), (rows[first + 1], 'val', 'validation'):
            errors = [record[part]['top1_error'] for record in sorted(records, key=lambda record: record['seed']) if record['name'].startswith(f'{name}-seed-')]
            assert f'| {images} | {", ".join(f"{error:.1%}" for error in errors)} | {sum(errors)/len(errors):.1%} |' in row


def test_page_of_versatility_states_what_its_records_say():
    "The mean of each network's figures over its seeds, in the row of its size and of the features that it tells pixels from, first trained together, then frozen."
    from fishnet_nb.versatility import CONTENDERS
    text = (ROOT/'nbs/11_versatility.ipynb').read_text(encoding='utf-8')
    records = [json.loads(path.read_text(encoding='utf-8')) for path in published('results/versatility/*.json')]
    names = {record['name'] for record in records}
    assert names == {*CONTENDERS, *(f'{name}-frozen' for name in CONTENDERS)} and len(records) == 3*len(names)
    for name in names:
        of_name = [record for record in records if record['name'] == name]
        kind = 'FishNet' if of_name[0]['arch'].startswith('fishnet') else 'ResNet'
        rows = [line for line in text.splitlines() if f'"| {kind} (' in line and f'| {of_name[0]["pixels"]} |' in line]
        row = rows[name.endswith('-frozen')]
        for key in of_name[0]['test']: assert f'| {100*sum(record["test"][key] for record in of_name)/len(of_name):.1f} (' in row, (name, key)


def test_model_card_states_what_the_tests_say():
    """Errors, images and data of the weights in the package are those of the record of their tests, which is of these very weights, and the weights are
    those of the run that the card names."""
    from fishnet_nb.models import list_pretrained, pretrained_path, read_about
    about, run = read_about(pretrained_path('fishnet73')), json.loads((ROOT/'results/cpu-wide/record.json').read_text(encoding='utf-8'))
    assert all(about[key] == run[key] for key in ('recipe', 'seed', 'commit', 'data', 'test', 'versions', 'device')) and about['arch_args'] == run['hparams']['model']['arch_args']
    card = (ROOT/'fishnet_nb/weights/README.md').read_text(encoding='utf-8')
    assert 'record in `results/cpu-wide`' in card and f'{run["params"]:,} parameters' in card
    tests = {entry['data']['description']: entry for entry in json.loads((ROOT/'results/pretrained/test.json').read_text(encoding='utf-8'))
             if entry['tested_sha256'] == list_pretrained()['fishnet73']}
    for data in 'CIFAR-10 (JPEG re-encoding)', 'CIFAR-10 (bit-exact subset)':
        entry = tests[data]
        shown, alone = ([f'{errors[key]:.1%}' for key in ('top1_error', 'top5_error')] for errors in (entry['errors']['mirrored'], entry['errors']['alone']))
        assert f'| {data} | {entry["data"]["n_test"]:,} | {shown[0]} | {shown[1]} | {alone[0]} | {alone[1]} |' in card


@pytest.fixture(scope='module')
def installed(copy, tmp_path_factory) -> Path:
    "The folder of the commands of an empty environment into which the wheel alone was installed, made from the source distribution."
    folder = tmp_path_factory.mktemp('wheel')
    uv = BIN/'uv'
    check(uv, 'build', '--quiet', '--out-dir', folder, copy)
    check(uv, 'venv', '--quiet', '--python', BIN/'python', folder/'venv')
    wheel, = folder.glob('*.whl')
    check(uv, 'pip', 'install', '--quiet', '--python', folder/'venv'/'bin'/'python', '--constraint', ROOT/'requirements.lock', wheel)
    return folder/'venv'/'bin'


def test_wheel_works_in_an_empty_environment(installed, tmp_path):
    env = {**os.environ, 'OMP_NUM_THREADS': '2', 'FISHNET_DATA': str(tmp_path/'none')}
    command = lambda *args: check(installed/'fishnet-nb', *args, cwd=tmp_path, env=env)
    imported = 'import sys, fishnet_nb, fishnet_nb.models as m; assert "pytorch_lightning" not in sys.modules; print(fishnet_nb.__file__, m.list_models())'
    assert 'site-packages' in check(installed/'python', '-c', imported, cwd=tmp_path, env=env)
    every = 'import importlib, pkgutil, fishnet_nb\nfor m in pkgutil.iter_modules(fishnet_nb.__path__):\n    if m.name != "__main__": importlib.import_module(f"fishnet_nb.{m.name}")'
    check(installed/'python', '-c', every, cwd=tmp_path, env=env)
    assert '17,918,784' in command('summary', 'fishnet99')
    command('fit', 'quick', '--trainer.max_epochs=1', '--trainer.limit_train_batches=2', '--trainer.limit_val_batches=1', '--trainer.limit_test_batches=1')
    Image.new('RGB', (40, 30), 'red').save(tmp_path/'red.png')
    assert 'red.png' in command('predict', 'red.png')  # by the weights in the package
    assert 'red.png' in command('predict', 'red.png', '--checkpoint', 'results/quick/checkpoints/best.ckpt')
