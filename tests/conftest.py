"""What several test files share."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    "The file that takes as long as all others together starts first: two workers that take whole files then end at the same time."
    items.sort(key=lambda i: i.path.name != 'test_pipeline.py')


@pytest.fixture(scope='module')
def browser():
    "Headless Chromium; skipped, saying so, where there is none."
    api = pytest.importorskip('playwright.sync_api', reason="no driver for a browser here: pip install 'gemmgan_nb[dev]'")
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if path is None: pytest.skip('no Chromium here; on Debian or Ubuntu: sudo apt-get install chromium')
    with api.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=path, args=['--no-sandbox'] if os.geteuid() == 0 else [])
        yield opened
        opened.close()


# /proc's own peak of the process: ru_maxrss begins with the parent's
PEAK = "def peak(): return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))*1024\n"


@pytest.fixture
def in_a_process_of_its_own():
    "Run code that may ask for its peak() memory in bytes, on one thread; what it prints comes back."
    if not Path('/proc/self/status').exists(): pytest.skip('peak memory is read from /proc')
    def run(code, *args):
        done = subprocess.run([sys.executable, '-c', PEAK + code, *map(str, args)], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()
    return run


@pytest.fixture(scope='session')
def tiny_place(tmp_path_factory):
    "A run on drawn slides, fitted in seconds: cohort, tiles, features, and one checkpoint. Copy what you change."
    from gemmgan_nb.generate import tiny_run
    return tiny_run(tmp_path_factory.mktemp('runs')/'tiny', steps=60)
