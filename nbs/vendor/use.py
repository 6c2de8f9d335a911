"""After the pages are rendered: maths is set by the KaTeX in this folder instead of the one on a CDN, and no theme fetches its font, so the site needs no
network to be read."""
import os
import re
from pathlib import Path

CHANGES = {'.html': (r'https://cdn\.jsdelivr\.net/npm/katex@[^/"]+/dist', 'vendor/katex'), '.css': (r'@import url\(["\']?https://fonts\.googleapis\.com[^)]*\);?', '')}
for path in Path(os.environ['QUARTO_PROJECT_OUTPUT_DIR']).rglob('*'):
    if path.suffix not in CHANGES: continue
    text = path.read_text(encoding='utf-8')
    local = re.sub(*CHANGES[path.suffix], text)
    if local != text: path.write_text(local, encoding='utf-8')
