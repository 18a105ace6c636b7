"""Slides: real ones, made ones that hold every hard case, and those that must fail well."""
import warnings
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from gemmgan_nb import slides
from gemmgan_nb.slides import Direct, Slide, SlideError, read_boxes, reduced, tiny_slide

REAL = Path(__file__).parents[1]/'..'/'shared'/'data'/'slides'
HER2ST = REAL.parent/'her2st'
real = pytest.mark.skipif(not REAL.is_dir(), reason='real slides are not here (../shared/data/slides)')
TCGA, CMU = 'tcga-cr-7395-01a-01-ts1.svs', 'cmu-1-small-region.svs'


@real
@pytest.mark.parametrize('name,mpp,source', [(CMU, .499, 'openslide.mpp-x'), (TCGA, None, None), ('small.svs', .499, 'openslide.mpp-x'),
                                             ('boxes_0.dcm', .499, 'openslide.mpp-x'), ('boxes.tiff', None, None)])
def test_mpp_and_where_it_comes_from(name, mpp, source):
    with Slide(REAL/name) as s: assert (s.mpp, s.mpp_source) == (mpp, source)      # boxes.tiff says 72 dpi, which no microscope has


def white(region):
    out = Image.new('RGB', region.size, 'white'); out.paste(region, mask=region.getchannel('A')); return np.asarray(out)


@real
@pytest.mark.parametrize('name', [CMU, TCGA])
def test_direct_pixels_are_openslides(name):
    """All tiles of the paper's grid and others at odd corners and sizes, over the border too."""
    with Slide(REAL/name) as s, openslide.OpenSlide(REAL/name) as o:
        assert s.reader == 'direct'
        w, h = s.dimensions
        for x in range(0, w, 256):
            for y in range(0, h, 512): np.testing.assert_array_equal(s.read(x, y), white(o.read_region((x, y), 0, (256, 256))))
        for x, y, n, m in np.random.default_rng(0).integers([-200, -200, 1, 1], [w, h, 500, 500], (12, 4)).tolist():
            np.testing.assert_array_equal(s.read(x, y, n, m), white(o.read_region((x, y), 0, (n, m))))
        assert len(s.direct.tiles) <= s.direct.keep


@real
def test_threads_read_the_same_in_order():
    with Slide(REAL/CMU) as s:
        at = [(x, y) for x in range(100, 1500, 200) for y in range(0, 2000, 256)]
        for a, b in zip(read_boxes(s, at, 256, 256, threads=4), read_boxes(s, at, 256, 256, threads=1), strict=True): np.testing.assert_array_equal(a, b)


def aperio(path, tiles, size, compression, tile=256):
    "An Aperio file from ready compressed tiles."
    with tifffile.TiffWriter(path) as tif:
        tif.write(iter(tiles), shape=(size, size, 3), dtype=np.uint8, tile=(tile, tile), photometric='rgb', compression=compression, metadata=None,
                  description=f'Aperio Image Library v11\n{size}x{size} ({tile}x{tile})|AppMag = 40|MPP = 0.25')
    return path


def picture(size=512, seed=0):
    small = np.random.default_rng(seed).integers(0, 255, (size//8, size//8, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((size, size)))


def cut(pixels, tile=256): return [np.ascontiguousarray(pixels[y:y + tile, x:x + tile]) for y in range(0, len(pixels), tile) for x in range(0, len(pixels), tile)]


@pytest.mark.parametrize('compression', [33003, 33005])
def test_both_kinds_of_jpeg_2000(tmp_path, compression):
    path = aperio(tmp_path/'a.svs', [imagecodecs.jpeg2k_encode(t, level=0, codecformat='j2k', mct=compression == 33005) for t in cut(picture())], 512, compression)
    with Slide(path) as s, openslide.OpenSlide(path) as o:
        assert s.reader == 'direct' and s.mpp == .25
        np.testing.assert_array_equal(s.read(30, 40, 400, 300), white(o.read_region((30, 40), 0, (400, 300))))


def test_tiles_of_zero_length_are_glass(tmp_path):
    tiles = [imagecodecs.jpeg8_encode(t, colorspace='RGB', outcolorspace='RGB') for t in cut(picture())]
    path = aperio(tmp_path/'a.svs', tiles, 512, 7)
    with tifffile.TiffFile(path, mode='r+') as tif: tif.pages[0].tags['TileByteCounts'].overwrite([len(t) for t in tiles[:3]] + [0])
    with Slide(path) as s, openslide.OpenSlide(path) as o:
        assert s.reader == 'direct'
        assert s.read(256, 256).min() == 255
        np.testing.assert_array_equal(s.read(100, 100, 400, 400), white(o.read_region((100, 100), 0, (400, 400))))


def test_a_reader_that_differs_is_not_used_and_says_so(tmp_path, monkeypatch):
    path = tiny_slide(tmp_path/'a.tiff', (600, 600))
    right = slides.TiledLevel.decode
    monkeypatch.setattr(slides.TiledLevel, 'decode', lambda self, i: right(self, i) ^ 1)
    with pytest.warns(UserWarning, match='a.tiff is read through OpenSlide: tile .* differs from OpenSlide by up to 1 grey'): s = Slide(path)
    assert s.reader.startswith('OpenSlide (tile')
    with openslide.OpenSlide(path) as o: np.testing.assert_array_equal(s.read(5, 5), white(o.read_region((5, 5), 0, (256, 256))))


@real
@pytest.mark.parametrize('name,why', [('boxes_0.dcm', 'format dicom'), ('boxes.tiff', None), ('small.svs', None)])
def test_who_reads(name, why):
    with warnings.catch_warnings(), Slide(REAL/name) as s:
        warnings.simplefilter('error')
        assert s.reader == (f'OpenSlide ({why})' if why else 'direct')
        w, h = s.dimensions
        with openslide.OpenSlide(REAL/name) as o: np.testing.assert_array_equal(s.read(0, 0, w, h), white(o.read_region((0, 0), 0, (w, h))))


@real
@pytest.mark.parametrize('bad', [b'', bytes(3000)])
def test_a_damaged_tile_never_turns_into_tissue(tmp_path, bad):
    "Half of a JPEG missing: the decoder alone would fill up with grey. The other tiles are read."
    raw = bytearray((REAL/CMU).read_bytes())
    with tifffile.TiffFile(REAL/CMU) as tif: start, n = tif.pages[0].dataoffsets[63], tif.pages[0].databytecounts[63]
    raw[start + n//2:start + n] = (bad*9)[:n - n//2].ljust(n - n//2, b'\0')
    (tmp_path/'a.svs').write_bytes(raw)
    with Slide(tmp_path/'a.svs') as s, Slide(REAL/CMU) as whole:
        np.testing.assert_array_equal(s.read(0, 0), whole.read(0, 0))
        with pytest.raises(SlideError, match='a.svs opens, but reading at .* fails'): s.read(63 % 10*240, 63//10*240)


@real
def test_reading_at_an_mpp_agrees_with_shrinking_level_0():
    with Slide(REAL/TCGA, mpp=.25) as s:      # has a second level at half the size
        small = s.read(1000, 800, mpp=.5).astype(float)
        full = np.asarray(Image.fromarray(s.read(1000, 800, 512)).reduce(2), float)
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
    with Slide(REAL/'unreadable.svs') as s, pytest.raises(SlideError, match='opens, but reading at'): s.read(0, 0, 16)


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
@pytest.mark.parametrize('name', [CMU, TCGA])
def test_a_download_that_broke_off_says_so(name, tmp_path):
    raw = (REAL/name).read_bytes()
    (tmp_path/'part.svs').write_bytes(raw[:len(raw)*2//3])
    with pytest.raises(SlideError, match=r'part.svs is cut short: .* ends at [\d,]+. The download is incomplete') as e: Slide(tmp_path/'part.svs')
    assert '\n' not in str(e.value)


def test_cut_after_the_directories(tmp_path):
    raw = tiny_slide(tmp_path/'a.tiff', (700, 700)).read_bytes()
    for share in (.3, .95, .999):
        (tmp_path/'part.tiff').write_bytes(raw[:int(len(raw)*share)])
        with pytest.raises(SlideError, match='part.tiff is cut short'): Slide(tmp_path/'part.tiff')
    (tmp_path/'part.tiff').write_bytes(b'')
    with pytest.raises(SlideError, match='part.tiff is empty'): Slide(tmp_path/'part.tiff')


def test_policies(tmp_path):
    path = tiny_slide(tmp_path/'a.tiff', (600, 600), mpp=None)
    for policy, mpp, source, scale in [('native', None, None, 1.), ('assume=0.25', .25, 'assumed', 2.)]:
        with Slide(path, policy=policy) as s: assert (s.mpp, s.mpp_source, s.scale(.5)) == (mpp, source, scale)
    with Slide(path, .4, 'assume=0.25', 'wsi,mpp table') as s: assert (s.mpp, s.mpp_source) == (.4, 'wsi,mpp table')
    with pytest.raises(ValueError, match='no mpp policy'): Slide(path, policy='20x')


def test_every_level_reads_as_openslide(tmp_path):
    path = tiny_slide(tmp_path/'a.tiff', (1024, 768))
    with Slide(path) as s, Slide(path, direct=False) as o:
        for shrink in (1, 2, 3, 4, 8, 20): np.testing.assert_array_equal(reduced(s, shrink), reduced(o, shrink))
        assert set(s.direct.checked.values()) == {''} and len(s.direct.checked) > 2


def test_the_store_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(Direct, 'KEEP', 4*3*256*256)
    with Slide(tiny_slide(tmp_path/'a.tiff', (1600, 1024))) as s:
        for _ in read_boxes(s, [(x, y) for x in range(0, 1400, 200) for y in range(0, 800, 200)], 256, 256, threads=3): pass
        assert len(s.direct.tiles) <= 4
