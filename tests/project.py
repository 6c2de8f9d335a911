"What the tests share: the project's folder, commands run in it, and the README made from index.ipynb."
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


def make_readme(folder: Path) -> str:
    "README.md of the project in `folder`: its index.ipynb as Markdown, with links that work from the top folder."
    text = check(BIN/'jupyter', 'nbconvert', '--log-level=ERROR', '--to=markdown', '--stdout',
                 r'--RegexRemovePreprocessor.patterns=^\s*#\|\s*hide', folder/'nbs'/'index.ipynb')
    text = re.sub(r'\]\((\w+\.ipynb)', r'](nbs/\1', text)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__': (ROOT/'README.md').write_text(make_readme(ROOT), encoding='utf-8')
