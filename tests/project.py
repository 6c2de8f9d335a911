"What the tests share: the project's folder, commands run in it, and the README made from index.ipynb."
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def run(*args: object, cwd: Path = ROOT, **kwargs: object) -> subprocess.CompletedProcess:
    "A command's result; its output is text."
    return subprocess.run([str(a) for a in args], cwd=cwd, capture_output=True, text=True, **kwargs)


def check(*args: object, **kwargs: object) -> str:
    "What a command prints; AssertionError with all of its output if it fails."
    done = run(*args, **kwargs)
    assert done.returncode == 0, f'{args} ended with {done.returncode}\n{done.stdout}\n{done.stderr}'
    return done.stdout


def copy_project(folder: Path) -> Path:
    "The files that git knows, as they stand, in a new checkout in `folder`."
    for name in check('git', 'ls-files').splitlines():
        if not (ROOT/name).is_file(): continue
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/name, folder/name)
    for args in (['init', '-q'], ['add', '-A']): check('git', *args, cwd=folder)
    return folder


def published(pattern: str) -> list[Path]:
    "The files of that pattern that belong to the project; a reader's own runs beside them are left alone."
    known = check('git', 'ls-files', '-z', cwd=ROOT).split('\0')
    return [path for path in sorted(ROOT.glob(pattern)) if str(path.relative_to(ROOT)) in known]


def _cell_as_markdown(cell: dict) -> list[str]:
    "What a reader sees of a cell: its text, or its code and the output."
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown': return [re.sub(r'\]\((\w+\.ipynb)', r'](nbs/\1', source)]
    if '#| hide' in source: return []
    shown = [] if '#| echo: false' in source else [f'```python\n{source}\n```']
    for output in cell['outputs']:
        data = output.get('data', {})
        text = ''.join(data.get('text/markdown') or '') or f"```\n{''.join(output.get('text') or data['text/plain']).rstrip()}\n```"
        shown.append(text)
    return shown


def make_readme(folder: Path) -> str:
    "README.md of the project in `folder`: its index.ipynb as Markdown, with links that work from the top folder."
    cells = json.loads((folder/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(text for cell in cells for text in _cell_as_markdown(cell)) + '\n'


if __name__ == '__main__': (ROOT/'README.md').write_text(make_readme(ROOT), encoding='utf-8')
