"""Slides and tiling on real slides, and on slides that must fail well."""
from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import pytest
from PIL import Image
from skimage.filters import threshold_otsu

from gemmgan_nb.data import read_tiles
from gemmgan_nb.slides import Slide, SlideError
from gemmgan_nb.tiling import plot_tiling, read_slides, tile_cohort, tile_grid, tile_images, tile_slide, tissue_fractions, tissue_mask

REAL = Path(__file__).parents[1]/'..'/'shared'/'data'/'slides'
HER2ST = REAL.parent/'her2st'
real = pytest.mark.skipif(not REAL.is_dir(), reason='real slides are not here (../shared/data/slides)')
TCGA, CMU = 'tcga-cr-7395-01a-01-ts1.svs', 'cmu-1-small-region.svs'


@real
@pytest.mark.parametrize('name,mpp,source', [(CMU, .499, 'openslide.mpp-x'), (TCGA, None, None), ('small.svs', .499, 'openslide.mpp-x'),
                                             ('boxes_0.dcm', .499, 'openslide.mpp-x'), ('boxes.tiff', None, None)])
def test_mpp_and_where_it_comes_from(name, mpp, source):
    with Slide(REAL/name) as s: assert (s.mpp, s.mpp_source) == (mpp, source)      # boxes.tiff says 72 dpi, which no microscope has


@real
@pytest.mark.parametrize('name', [CMU, TCGA])
def test_native_read_is_openslides_pixels(name):
    r = np.random.default_rng(0)
    with Slide(REAL/name) as s, openslide.OpenSlide(REAL/name) as o:
        for x, y in r.integers(0, [d - 256 for d in s.dimensions], (5, 2)):
            np.testing.assert_array_equal(s.read(x, y), np.asarray(o.read_region((int(x), int(y)), 0, (256, 256)).convert('RGB')))


@real
def test_reading_at_an_mpp_agrees_with_shrinking_level_0():
    with Slide(REAL/TCGA, mpp=.25) as s:      # has a second level at half the size
        small = s.read(1000, 800, mpp=.5).astype(float)
        full = np.asarray(Image.fromarray(s.read(1000, 800, size=512)).reduce(2), float)
    assert np.abs(small - full).mean() < 6
    assert np.corrcoef(small.ravel(), full.ravel())[0, 1] > .97


@real
def test_edge_is_white():
    with Slide(REAL/CMU) as s:
        w, h = s.dimensions
        tile = s.read(w - 100, h - 50)
        assert tile.shape == (256, 256, 3) and tile[50:].min() == 255 and tile[:, 100:].min() == 255 and tile[:50, :100].min() < 255


@real
def test_no_mpp_says_what_to_do():
    with Slide(REAL/TCGA) as s, pytest.raises(SlideError, match='has no mpp.*slides.csv.*native'): s.read(0, 0, mpp=.5)
    with Slide(REAL/TCGA, mpp=.25) as s: assert s.mpp_source == 'given' and s.read(0, 0, mpp=.5).shape == (256, 256, 3)


@real
@pytest.mark.parametrize('name', ['unopenable.tiff', 'broken.svs'])
def test_unopenable(name):
    with pytest.raises(SlideError, match='download it again'): Slide(REAL/name).read(0, 0)


@real
def test_opens_but_cannot_be_read():
    with Slide(REAL/'unreadable.svs') as s, pytest.raises(SlideError, match='opens, but reading at'): s.read(0, 0, size=16)


def test_missing(tmp_path):
    with pytest.raises(SlideError, match='nosuch.svs is not in'): Slide(tmp_path/'nosuch.svs')


def test_truncated_jpeg(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)).save(tmp_path/'cut.jpg')
    (tmp_path/'cut.jpg').write_bytes((tmp_path/'cut.jpg').read_bytes()[:9000])
    with Slide(tmp_path/'cut.jpg') as s, pytest.raises(SlideError, match='cut.jpg opens, but reading'): s.read(0, 0)


@pytest.mark.skipif(not HER2ST.is_dir(), reason='real sections are not here (../shared/data/her2st)')
def test_large_jpeg_opens_without_warning(recwarn):
    with Slide(HER2ST/'C4.jpg', mpp=.688) as s:
        assert s.dimensions == (9278, 9916)
        assert s.read(4000, 4000, mpp=.78).shape == (256, 256, 3)
    assert not [w for w in recwarn if 'DecompressionBomb' in str(w.category)]


@real
@pytest.mark.parametrize('name,least', [(CMU, .95), (TCGA, .98)])
def test_low_resolution_mask_keeps_the_tiles_of_level_0(name, least):
    "The paper's way, Otsu on level 0, against ours at 8 um/px: overlap of the kept tiles."
    with Slide(REAL/name) as s:
        ours = tile_grid(s, tissue_mask(s)[0])
        w, h = s.dimensions
        gray = np.asarray(s.handle.read_region((0, 0), 0, (w, h)).convert('L'))
        share = tissue_fractions(gray < threshold_otsu(gray), np.arange(0, w, 256), np.arange(0, h, 256), (256, 256))
    paper = {(256*i, 256*j) for i, j in np.argwhere(share > .2)}
    kept = set(zip(ours.x, ours.y, strict=True))
    assert len(kept & paper)/len(kept | paper) >= least


@real
def test_bad_slides_do_not_stop_the_cohort(tmp_path):
    names = [CMU, TCGA, 'unreadable.svs', 'unopenable.tiff', 'broken.svs', 'nosuch.svs']
    pd.DataFrame(dict(slide=[Path(n).stem for n in names], path=[str((REAL/n).resolve()) for n in names])).to_csv(tmp_path/'slides.csv', index=False)
    summary = tile_cohort(read_slides(tmp_path/'slides.csv'), tmp_path/'tiles').set_index('slide')
    assert summary.n_tiles[Path(CMU).stem] == 47 and summary.n_tiles[Path(TCGA).stem] == 168
    assert (summary.status == 'ok').sum() == 2
    problems = pd.read_csv(tmp_path/'tiles'/'problems.csv')
    assert sorted(problems.item) == ['broken', 'nosuch', 'unopenable', 'unreadable']
    assert sorted(p.name for p in (tmp_path/'tiles').iterdir()) == sorted([f'{Path(CMU).stem}.h5', f'{Path(TCGA).stem}.h5', 'problems.csv', 'tiles.csv'])


@real
def test_tile_file_has_the_names_other_tools_use(tmp_path):
    tile_slide(REAL/CMU, tmp_path/'a.h5', mpp=.998)
    coords, attrs = read_tiles(tmp_path/'a.h5')
    assert coords.dtype == np.int64
    for key in 'patch_size patch_size_level0 level0_magnification target_magnification overlap name level0_width level0_height mpp mpp_source tissue_method threshold min_tissue'.split():
        assert key in attrs, key
    assert (attrs['patch_size'], attrs['patch_size_level0']) == (256, 512)
    with Slide(REAL/CMU) as s: assert len(list(tile_images(s, coords, attrs))) == len(coords)


@real
def test_zero_tiles_is_a_clear_error(tmp_path):
    with pytest.raises(SlideError, match='no tile with more than 100% tissue'): tile_slide(REAL/CMU, tmp_path/'a.h5', min_tissue=1.)
    assert not (tmp_path/'a.h5').exists()


@real
@pytest.mark.parametrize('name', [CMU, TCGA])
def test_figure_2(name, tmp_path):
    with Slide(REAL/name) as s: plot_tiling(s).savefig(tmp_path/'f.png')
    assert (tmp_path/'f.png').stat().st_size > 20_000
