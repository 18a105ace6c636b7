"""Chapters as a reader meets them: a real JupyterLab in headless Chromium, opened, run from the menu, looked at."""
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PLAYGROUND = '28_playground'
CHAPTERS = [p.stem for p in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')) if p.stem != PLAYGROUND]


def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab with settings of its own, over a copy of the chapters without their outputs."
    folder, port = tmp_path_factory.mktemp('lab'), free_port()
    (folder/'nbs').mkdir()
    for name in ('workflow', 'data_manifest', 'figures', 'gemmgan_nb', 'settings.ini', 'pyproject.toml', 'Makefile', 'constraints.txt'): (folder/name).symlink_to(ROOT/name)      # what chapters read of the project
    for name in (*CHAPTERS, PLAYGROUND):
        nb = json.loads((ROOT/f'nbs/{name}.ipynb').read_text())
        for c in nb['cells']:
            if c['cell_type'] == 'code': c.update(outputs=[], execution_count=None)
        (folder/f'nbs/{name}.ipynb').write_text(json.dumps(nb))
    (folder/'CONFIG/labconfig').mkdir(parents=True)
    (folder/'CONFIG/labconfig/page_config.json').write_text(json.dumps(dict(disabledExtensions={'@jupyterlab/apputils-extension:announcements': True})))      # no news, no request
    own = {f'JUPYTER_{k}_DIR': str(folder/k) for k in ('CONFIG', 'DATA', 'RUNTIME')} | dict(IPYTHONDIR=str(folder/'ipython'), OMP_NUM_THREADS='1')
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', f'--port={port}', '--ServerApp.port_retries=0', '--IdentityProvider.token=reader', f'--ServerApp.root_dir={folder/"nbs"}',
               *(['--allow-root'] if os.geteuid() == 0 else [])]
    with open(folder/'lab.log', 'w') as log: server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log, cwd=folder)
    at = f'http://127.0.0.1:{port}'
    for _ in range(180):
        if server.poll() is not None: pytest.fail((folder/'lab.log').read_text()[-2000:])
        try: urllib.request.urlopen(f'{at}/api/status?token=reader', timeout=5); break
        except OSError: time.sleep(1)
    yield at, folder/'nbs'
    server.terminate()
    try: server.wait(30)
    except subprocess.TimeoutExpired: server.kill()


def cells(path):
    for _ in range(50):
        try: return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code' and ''.join(c['source']).strip()]
        except json.JSONDecodeError: time.sleep(.1)      # JupyterLab is writing it
    pytest.fail(f'{path} is no notebook')
def errors(path): return [o['evalue'] for c in cells(path) for o in c['outputs'] if o['output_type'] == 'error']


@pytest.mark.parametrize('name', CHAPTERS)
def test_a_chapter_runs_from_the_menu_without_an_error_and_shows_its_pictures(lab, browser, name, tmp_path):
    (at, folder), page = lab, browser.new_page(viewport=dict(width=1400, height=1000))
    elsewhere = []; page.on('request', lambda r: elsewhere.append(r.url) if not r.url.startswith((at, 'data:', 'blob:', at.replace('http', 'ws'))) else None)
    path = open_and_run(page, at, folder, name)
    page.screenshot(path=tmp_path/f'{name}_end.png')
    assert not errors(path)
    assert all(c['execution_count'] for c in cells(path)), 'not all cells ran in ten minutes'
    noise = lambda at: sum(o.get('name') == 'stderr' for c in cells(at) for o in c['outputs'])
    assert noise(path) <= noise(ROOT/f'nbs/{name}.ipynb')      # a warning belongs into a chapter where one is shown
    made = sum('image/png' in o.get('data', {}) for c in cells(path) for o in c['outputs'])
    assert made == sum(bool({'image/png', 'image/jpeg'} & o.get('data', {}).keys()) for c in cells(ROOT/f'nbs/{name}.ipynb') for o in c['outputs']) > 0
    shown = look_through(page, tmp_path/f'{name}.png')
    assert shown == made
    assert not elsewhere
    page.close()


def test_the_playground_answers_when_a_control_is_turned(lab, browser, tmp_path):
    (at, folder), page = lab, browser.new_page(viewport=dict(width=1400, height=1150))
    path = open_and_run(page, at, folder, PLAYGROUND)
    assert not errors(path) and all(c['execution_count'] for c in cells(path))
    scroll_to(page, 'img.widget-image')
    page.screenshot(path=tmp_path/'board.png')
    for turn in (lambda: page.locator('.widget-dropdown select').first.select_option('necrosis'),
                 lambda: (page.locator('.widget-textarea textarea').fill('He is sixty and has a tumour of the breast.'), page.keyboard.press('Tab'))):
        before = pixels(page); turn()
        until = time.time() + 120
        while pixels(page) == before and time.time() < until: page.wait_for_timeout(200)
        assert pixels(page) != before, 'the picture did not follow the control'
    page.wait_for_timeout(500); page.screenshot(path=tmp_path/'board_after.png')
    assert 'answered in' in page.locator('.widget-html', has_text='answered').inner_text()
    before = pixels(page); page.locator('.widget-textarea textarea').fill(' '); page.keyboard.press('Tab')
    page.locator('.widget-html', has_text='is empty').wait_for(timeout=60_000); assert pixels(page) == before
    page.locator('.jp-Notebook').first.click(position=dict(x=5, y=5)); page.keyboard.press('Control+s'); time.sleep(3)
    assert 'widgets' not in json.loads(path.read_text())['metadata']
    page.close()


def test_no_state_of_a_control_is_kept_in_a_committed_chapter():
    for path in sorted((ROOT/'nbs').glob('*.ipynb')):
        nb = json.loads(path.read_text())
        assert 'widgets' not in nb['metadata'], path.name
        assert not [o for c in nb['cells'] for o in c.get('outputs', []) if any('widget' in kind for kind in o.get('data', {}))], path.name


def pixels(page): return page.locator('img.widget-image').first.evaluate("i => fetch(i.src).then(r => r.arrayBuffer()).then(b => crypto.subtle ? crypto.subtle.digest('SHA-1', b) : b).then(h => [...new Uint8Array(h)].slice(0, 20).join())")


def scroll_to(page, what):
    "Scrolls from top to bottom until it is there, then brings it into view."
    notebook = page.locator('.jp-WindowedPanel-outer').first
    notebook.evaluate("n => n.scrollTop = 0")
    for _ in range(80):
        page.wait_for_timeout(250)
        if page.locator(what).count(): page.locator(what).first.scroll_into_view_if_needed(); page.wait_for_timeout(1500); return
        if notebook.evaluate("n => { const before = n.scrollTop; n.scrollTop += 700; return n.scrollTop == before }"): break
    pytest.fail(f'there is no {what}')


def open_and_run(page, at, folder, name):
    "Opens a chapter alone, runs all of it, saves; its path."
    page.goto(f'{at}/lab/workspaces/{name}/tree/{name}.ipynb?token=reader', timeout=180_000)      # a workspace each, so that only this chapter is open
    page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=180_000)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=180_000)      # what is asked of a kernel that is not there yet is lost
    run_all(page)
    path, until = folder/f'{name}.ipynb', time.time() + 600
    while time.time() < until and not (all(c['execution_count'] for c in cells(path)) or errors(path)): page.keyboard.press('Control+s'); time.sleep(2)
    time.sleep(1); page.keyboard.press('Control+s'); time.sleep(2)
    return path


def run_all(page):
    "Run > Run All Cells, as a hand does it: a menu that has just opened takes no click yet."
    for _ in range(5):
        if page.locator('.jp-Dialog').count(): pytest.fail(f"JupyterLab asks: {page.locator('.jp-Dialog').first.inner_text()}")
        page.locator('.lm-MenuBar-itemLabel', has_text='Run').first.click(); page.wait_for_timeout(800)
        item = page.locator('.lm-Menu-itemLabel', has_text='Run All Cells').first
        if item.is_visible(): item.hover(); page.wait_for_timeout(300); item.click()
        page.wait_for_timeout(3000)
        if page.evaluate(r"[...document.querySelectorAll('.jp-InputPrompt')].some(p => /\[[*\d]/.test(p.textContent))"): return
        page.keyboard.press('Escape')
    pytest.fail('nothing started to run')


def look_through(page, picture):
    "Scrolls from top to bottom; how many different pictures were seen, a screenshot of the first."
    seen, notebook = set(), page.locator('.jp-WindowedPanel-outer').first
    page.locator('.jp-Notebook').first.evaluate("n => n.scrollTop = 0"); notebook.evaluate("n => n.scrollTop = 0")
    for _ in range(80):
        page.wait_for_timeout(250)
        found = page.evaluate("[...document.querySelectorAll('.jp-OutputArea-output img')].filter(i => i.naturalWidth > 20 && i.getBoundingClientRect().width > 20).map(i => i.src.slice(-400))")
        if found and not seen: page.locator('.jp-OutputArea-output img').first.scroll_into_view_if_needed(); page.wait_for_timeout(500); page.screenshot(path=picture)
        seen |= set(found)
        if notebook.evaluate("n => { const before = n.scrollTop; n.scrollTop += 700; return n.scrollTop == before }"): break
    return len(seen)
