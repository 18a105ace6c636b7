"""What several test files share."""
import os
import shutil

import pytest


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
