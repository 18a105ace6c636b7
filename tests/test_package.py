"""The library as a whole: it stands alone, agrees with its notebooks, and its notebooks are clean."""
import ast
import json
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import papermill
import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p.stem for p in (ROOT/'gemmgan_nb').glob('[a-z]*.py'))
NOTEBOOKS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
BLOCK = "import sys; sys.modules.update(dict.fromkeys('nbdev fastcore execnb IPython jupyterlab pytest'.split()))"
EACH_ALONE = """
import os, torch, torchvision, timm, transformers, sklearn, scipy.stats, anndata, skimage, matplotlib.pyplot, openslide, tifffile   # once for all: a child starts with them
for module in sys.argv[1:]:
    if not (child := os.fork()):
        try: __import__(f'gemmgan_nb.{module}'); os._exit(0)
        except BaseException as e: print(f'{module}: {e!r}', flush=True); os._exit(1)
    os.waitpid(child, 0)
"""


def test_every_module_imports_alone_without_nbdev_or_jupyter():
    ran = subprocess.run([sys.executable, '-c', BLOCK + EACH_ALONE, *MODULES], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0 and not ran.stdout, ran.stdout + ran.stderr[-2000:]


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The files that export and clean work on, in a folder of their own."
    to = tmp_path_factory.mktemp('copy')
    for name in ('nbs', 'gemmgan_nb'): shutil.copytree(ROOT/name, to/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('pyproject.toml', 'settings.ini', 'setup.py', 'README.md'): shutil.copy(ROOT/name, to/name)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in ('nbdev-export', 'nbdev-clean'): subprocess.run([command], cwd=to, check=True, env=env)
    return to


@pytest.mark.parametrize('folder, pattern', [('gemmgan_nb', '*.py'), ('nbs', '*.ipynb')])
def test_export_in_sync_and_notebooks_clean(copy, folder, pattern):
    changed = [p.name for p in sorted((ROOT/folder).glob(pattern)) if p.read_bytes() != (copy/folder/p.name).read_bytes()]
    assert not changed, f'Run `make clean-nbs` and commit: {changed}'


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_imports_only_from_lower_numbers(notebook):
    number = {p.stem[3:]: int(p.stem[:2]) for p in NOTEBOOKS}
    for cell in json.loads(notebook.read_text())['cells']:
        if cell['cell_type'] != 'code': continue
        source = '\n'.join(line for line in ''.join(cell['source']).splitlines() if not line.startswith(('%', '!')))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('gemmgan_nb.'):
                assert number[node.module.split('.')[1]] < int(notebook.stem[:2]), f'{notebook.stem} imports {node.module}'


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_small_and_portable(notebook):
    text = notebook.read_text()
    assert len(text) < 500_000
    assert '/home/' not in text and '/work/' not in text and '/root/' not in text
    assert 'widget' not in json.loads(text)['metadata']


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_every_parameter_of_a_stage_is_used(notebook):
    cells = json.loads(notebook.read_text())['cells']
    tagged = [i for i, c in enumerate(cells) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) <= 1
    for i in tagged:
        names = [n.targets[0].id for n in ast.parse(''.join(cells[i]['source'])).body]
        later = '\n'.join(''.join(c['source']) for c in cells[i + 1:] if c['cell_type'] == 'code')
        used = {n.id for n in ast.walk(ast.parse(later)) if isinstance(n, ast.Name)}
        assert set(names) <= used, f'{notebook.stem}: {set(names) - used} is read by nobody'


def test_version_and_requirements_come_from_settings_ini():
    config = ConfigParser()
    config.read(ROOT/'settings.ini')
    installed = metadata.metadata('gemmgan_nb')
    assert installed['Version'] == config['DEFAULT']['version']
    asked = {r.split(';')[0].strip() for r in installed.get_all('Requires-Dist') if 'extra' not in r}
    assert asked == set(config['DEFAULT']['requirements'].split())


def test_no_large_file_is_committed():
    if not (ROOT/'.git').exists(): pytest.skip('not a git checkout')
    files = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True).stdout.split('\0')
    assert not [f for f in files if f and (ROOT/f).exists() and (ROOT/f).stat().st_size > 1_000_000]


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_papermill_sees_every_parameter(notebook):
    "Its reader passes over a line with a second '=' in its comment, without a word; a stage then refuses the setting."
    cells = [c for c in json.loads(notebook.read_text())['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    if not cells: pytest.skip('no stage')
    assert set(papermill.inspect_notebook(str(notebook))) == {t.id for c in cells for n in ast.parse(''.join(c['source'])).body if isinstance(n, ast.Assign) for t in n.targets}
