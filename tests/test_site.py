"The site as a reader meets it: in Chromium, with the network cut. Without Chromium only its files are checked."
import ast
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup
from playwright.sync_api import Page, sync_playwright

from project import BIN, ROOT, check, copy_project

PAGES = [path.with_suffix('.html').name for path in sorted((ROOT/'nbs').glob('*.ipynb'))]
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason='Chromium is not installed, so nothing is looked at in a browser')


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    "The site, made of a copy of the project by `make site`."
    copy = copy_project(tmp_path_factory.mktemp('site')/'fishnet_nb')
    (copy/'.venv').symlink_to(ROOT/'.venv')
    check('make', '-o', '.venv/.installed', 'site', cwd=copy)  # installs nothing from the copy
    return copy/'_docs'


@pytest.fixture(scope='module')
def pages(site) -> dict[str, BeautifulSoup]:
    "The pages that notebooks make, by name."
    return {name: BeautifulSoup((site/name).read_text(encoding='utf-8'), 'html.parser') for name in PAGES}


@pytest.fixture(scope='module')
def address(site) -> str:
    "Where the site is served."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


@pytest.fixture(scope='module')
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-background-networking'])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, address) -> Page:
    "A page that reaches the site and nothing else. Errors in its console and failed requests fail the test."
    context, wrong = chromium.new_context(viewport=dict(width=1280, height=900)), []
    context.route('**/*', lambda route: route.continue_() if route.request.url.startswith(address) else route.abort())
    page = context.new_page()
    page.on('console', lambda message: wrong.append(message.text) if message.type == 'error' else None)
    page.on('pageerror', lambda error: wrong.append(str(error)))
    page.on('requestfailed', lambda request: wrong.append(f'{request.url} failed'))
    yield page
    context.close()
    assert not wrong


def wait_until_set(page: Page) -> None:
    """Until fonts and equations are there: what a reader sees once the page has loaded. It asks the page itself and not for Playwright's 'networkidle', which
    on a busy machine never came although every request had long ended."""
    page.wait_for_function("document.readyState == 'complete' && document.fonts.status == 'loaded'"
                           " && [...document.querySelectorAll('.math')].every(math => math.querySelector('.katex'))", timeout=60_000)


def keep_screenshot(page: Page, name: str) -> None:
    "In artifacts/, to be looked at."
    (ROOT/'artifacts').mkdir(exist_ok=True)
    page.screenshot(path=ROOT/'artifacts'/f'{name}.png')


def test_no_broken_link(site):
    assert set(PAGES) <= {path.name for path in site.glob('*.html')}
    pages = {path: BeautifulSoup(path.read_text(encoding='utf-8'), 'html.parser') for path in site.rglob('*.html')}
    ids = {path: {tag['id'] for tag in page.find_all(id=True)} for path, page in pages.items()}
    broken = []
    for path, page in pages.items():
        for tag, key in [(t, k) for k in ('href', 'src') for t in page.find_all(attrs={k: True})]:
            url = urlsplit(tag[key])
            if url.netloc == 'fishnet-nb.github.io' and tag.name == 'a': broken.append(f'{path.name}: {tag[key]} leaves the site for itself')
            if url.scheme or url.netloc: continue
            target = (path.parent/unquote(url.path)).resolve() if url.path else path
            if target.is_dir(): target = target/'index.html'
            if not target.exists() or (url.fragment and target in ids and unquote(url.fragment) not in ids[target]): broken.append(f'{path.name}: {tag[key]}')
    assert not broken, '\n'.join(sorted(set(broken)))


def test_each_page_says_where_it_comes_from(pages):
    for name, page in pages.items():
        links = [tag['href'] for tag in page.find_all('a', href=True)]
        assert any(re.search(rf'github.com/.*/{name[:-5]}.ipynb$', link) for link in links), name
        assert any(re.search(rf'colab.research.google.com/.*/{name[:-5]}.ipynb$', link) for link in links), name


def test_names_in_the_text_lead_to_their_definition(pages):
    links = {link.get_text(): link['href'] for link in pages['08_testing.html'].find_all('a', href=True) if link.find('code')}
    assert links['evaluate'] == '08_testing.html#evaluate'


def exported() -> list[tuple[str, str, list[str]]]:
    "Each function and class that the notebooks export: module, name and parameters, which of a NamedTuple are its fields."
    found = []
    for path in sorted((ROOT/'fishnet_nb').glob('[a-z]*.py')):
        nodes = ast.parse(path.read_text(encoding='utf-8')).body
        names = next((ast.literal_eval(node.value) for node in nodes if isinstance(node, ast.Assign) and node.targets[0].id == '__all__'), [])
        for node in nodes:
            if getattr(node, 'name', None) not in names: continue
            made = node if isinstance(node, ast.FunctionDef) else next((method for method in node.body if getattr(method, 'name', '') == '__init__'), None)
            parameters = [arg.arg for arg in made.args.args + made.args.kwonlyargs] if made else [field.target.id for field in node.body if isinstance(field, ast.AnnAssign)]
            found.append((path.stem, node.name, [parameter for parameter in parameters if parameter != 'self']))
    return found


def test_each_exported_name_is_documented(pages):
    "A heading, a link to its line in the source, and its parameters."
    headings, missing = {heading.get_text(strip=True): heading for page in pages.values() for heading in page.select('.cell-output-markdown h3')}, []
    assert len(exported()) > 50
    for module, name, parameters in exported():
        if name not in headings: missing.append(f'{module}.{name} is on no page'); continue
        source, shown = headings[name].find_previous('a', string='source'), headings[name].find_next('pre').get_text()
        if not re.search(rf'/{module}\.py#L\d+$', source['href']): missing.append(f'{module}.{name} has no link to its source')
        absent = [parameter for parameter in parameters if not re.search(rf'\b{parameter}\b', shown)]
        if absent: missing.append(f'{module}.{name} does not show {", ".join(absent)}')
    assert not missing, '\n'.join(missing)


def test_nothing_is_left_unrendered(pages):
    "No dollar sign of an equation, no link or footnote in Markdown outside of code; and no link within code."
    for name, page in pages.items():
        for text in page.find('main').find_all(string=re.compile(r'\$|\]\(|\[\^|\*\*')):
            around = [parent.name for parent in text.parents] + sum((parent.get('class', []) for parent in text.parents), [])
            assert {'code', 'pre', 'math', 'script'} & set(around), f'{name}: {text}'
        for code in page.select('.cell-output-markdown pre'): assert '](' not in code.get_text(), f'{name}: {code.get_text()}'


def test_pictures_have_a_text(pages):
    for name, page in pages.items():
        assert all(len(image.get('alt', '')) > 20 for image in page.find('main').find_all('img')), name


def test_readers_of_text_find_all_pages(site):
    text = (site/'llms.txt').read_text(encoding='utf-8')
    for name in PAGES: assert name[:-5] in text


def test_quarto_and_the_renderer_here_read_the_same():
    "The project files are plain YAML, and the sidebar names each page once."
    config, sidebar = (yaml.safe_load((ROOT/'nbs'/name).read_text(encoding='utf-8')) for name in ('_quarto.yml', 'sidebar.yml'))
    assert config['project']['type'] == 'website' and config['metadata-files'] == ['sidebar.yml'] and (ROOT/'nbs'/'site'/'finish.py').is_file()
    assert f"doc_path = {config['project']['output-dir']}\n" in (ROOT/'settings.ini').read_text(encoding='utf-8')  # where nbdev_docs looks for it, within its copy of the pages
    def pages(contents): return [page for item in contents for page in ([item] if isinstance(item, str) else pages(item['contents']) if 'contents' in item else [item['href']])]
    assert sorted(pages(sidebar['website']['sidebar']['contents'])) == sorted(path.name for path in (ROOT/'nbs').glob('*.ipynb'))
    for path in (ROOT/'nbs').glob('*.ipynb'):
        text = '\n'.join(''.join(cell['source']) for cell in json.loads(path.read_text(encoding='utf-8'))['cells'] if cell['cell_type'] == 'markdown')
        assert not re.search(r'^:::|\{\{<|\{#(fig|tbl|eq|sec)-|@(fig|tbl|eq|sec)-', text, flags=re.M), f'{path.name} has syntax that only Quarto reads'


@needs_chromium
@pytest.mark.parametrize('name', PAGES)
def test_page_in_the_browser(page, address, name):
    "No error, no request that fails, equations set, no sideways scrolling on a phone, nothing in the way of a keyboard or a screen reader."
    page.goto(address + name)
    wait_until_set(page)
    assert not page.locator('.katex-error').count()
    grounds = set()
    for scheme in 'light', 'dark':
        page.emulate_media(color_scheme=scheme)
        page.reload()
        wait_until_set(page)
        grounds.add(page.evaluate('getComputedStyle(document.body).backgroundColor'))
        assert not (found := violations(page)), f'{scheme}: {found}'
    assert len(grounds) == 2
    page.set_viewport_size(dict(width=375, height=700))
    assert page.evaluate('document.documentElement.scrollWidth') <= 375
    assert not (found := violations(page)), found
    page.emulate_media(color_scheme='light')
    keep_screenshot(page, f'{name[:-5]}-phone')


def violations(page: Page) -> list[str]:
    "What axe finds wrong."
    return [f'{found["id"]}: {found["nodes"][0]["html"][:200]}' for found in Axe().run(page).response['violations']]


@needs_chromium
def test_equations_are_numbered(page, address):
    page.goto(address + '00_review.html')
    wait_until_set(page)
    tags = page.locator('.katex-html .tag').all_inner_texts()
    assert [re.sub(r'\W', '', tag) for tag in tags] == ['1', '2', '3', '4', '5', '6', '7', '8', '8', '9']
    page.locator('.katex-display').nth(1).scroll_into_view_if_needed()
    keep_screenshot(page, 'equations')


@needs_chromium
@pytest.mark.parametrize('words, found', [('plan_channels', '05_channels.html'), ('isolated convolution', '00_review.html')])
def test_search_finds_a_symbol_and_a_sentence(page, address, words, found):
    page.goto(address + 'index.html')
    page.locator('#quarto-search input').fill(words)
    page.locator(f'#quarto-search a[href*="{found}"]').first.wait_for(timeout=10_000)
    keep_screenshot(page, f'search-{words.split()[0]}')


@needs_chromium
def test_previous_and_next_lead_through_all_pages(page, address):
    page.goto(address + 'index.html')
    seen = ['index.html']
    while page.locator('.nav-page-next a').count():
        wait_until_set(page)  # or what it still fetches is cut off
        with page.expect_navigation(): page.locator('.nav-page-next a').click()
        seen.append(Path(urlsplit(page.url).path).name)
    assert sorted(seen) == sorted(PAGES) and seen[1] == '00_review.html'
    back = [seen[-1]]
    while page.locator('.nav-page-previous a').count():
        wait_until_set(page)
        with page.expect_navigation(): page.locator('.nav-page-previous a').click()
        back.append(Path(urlsplit(page.url).path).name)
    assert back == seen[::-1]


@pytest.fixture(scope='module')
def lab(tmp_path_factory) -> str:
    "JupyterLab on a copy of the notebooks: its address."
    folder = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT/'nbs', folder/'nbs')
    env = {**os.environ, 'JUPYTER_RUNTIME_DIR': str(folder/'runtime'), 'JUPYTER_CONFIG_DIR': str(folder/'config'), 'PYTHONPATH': str(ROOT)}
    server = subprocess.Popen([BIN/'jupyter', 'lab', '--no-browser', '--allow-root', '--ServerApp.port=0', '--IdentityProvider.token=t', f'--ServerApp.root_dir={folder}'],
                              env=env, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=folder)
    yield next(found[0] for line in server.stderr if (found := re.search(r'http://127\.0\.0\.1:\d+/', line)))
    server.terminate()
    server.wait(20)


@needs_chromium
def test_run_all_in_jupyterlab(chromium, lab):
    "A reader finds the notebooks in reading order, opens the page on channels, runs all of it, and changes the widths."
    context = chromium.new_context(viewport=dict(width=1400, height=1000))
    page = context.new_page()
    page.goto(f'{lab}lab/tree/nbs/05_channels.ipynb?token=t')
    page.locator('.jp-NotebookPanel .jp-Toolbar-kernelName', has_text='Python').wait_for(timeout=60_000)
    page.locator('.jp-DirListing-itemText', has_text='11_versatility').wait_for(timeout=60_000)
    listed = [name for name in page.locator('.jp-DirListing-itemText').all_inner_texts() if re.match(r'\d.*(?<!_ko)\.ipynb$', name)]
    assert listed == sorted(listed) and listed[0] == '00_review.ipynb' and listed[-1] == '11_versatility.ipynb'
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(timeout=60_000)  # the kernel has started
    page.locator('.lm-MenuBar-itemLabel', has_text='Run').click()
    page.locator('.lm-Menu-itemLabel', has_text=re.compile('^Run All Cells$')).click()
    page.locator('.widget-text input').wait_for(timeout=120_000)
    page.locator('img.widget-image').wait_for(timeout=60_000)
    assert not page.locator('.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"], .jp-Notebook .jp-mod-error').count()
    before = page.locator('img.widget-image').get_attribute('src')
    field = page.locator('.widget-text input')
    field.fill('32, 64, 128')
    field.press('Enter')
    page.wait_for_function("before => { const now = document.querySelector('img.widget-image'); return now && now.src !== before }", arg=before, timeout=60_000)
    keep_screenshot(page, 'jupyterlab')
    context.close()
