"""DALI against the CPU path, in its CPU mode and on a GPU: the same windows, the same refusals, pixels nearly so."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import simplejpeg
import torch
from data.making import jpeg, picture, text_sample, undecodable_jpeg, write_tar

from cmpt.data import dali
from cmpt.data.dali import DaliDecoder
from cmpt.data.decode import DecodedBatch, Encoded, crop_draws, train_pixels
from cmpt.data.validate import Cause, DataError, ImageHeader, examine_image
from cmpt.recipe import schema

pytest.importorskip("nvidia.dali", reason="nvidia-dali-cuda130 is not installed", exc_type=ImportError)

CPU = torch.device("cpu")
SMALL = schema.Image(size=16, crop_scale=(0.4, 1.0), flip=True)


def encode(image: PIL.Image.Image | np.ndarray, image_format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, image_format, **options)
    return file.getvalue()


def exif(orientation: int) -> PIL.Image.Exif:
    found = PIL.Image.Exif()
    found[0x0112] = orientation
    return found


def encoded(datas: Sequence[bytes], seed: int = 0) -> list[Encoded]:
    draws_BK = crop_draws(seed, np.arange(len(datas)))
    return [Encoded(data, examine_image(data, 10**8), draws) for data, draws in zip(datas, draws_BK, strict=True)]


def reference(items: Sequence[Encoded], image: schema.Image) -> torch.Tensor:
    return torch.from_numpy(np.stack([train_pixels(*item, image) for item in items]))


def difference(found_BCHW: torch.Tensor, expected_BCHW: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference per picture, of 255."""
    assert found_BCHW.shape == expected_BCHW.shape and found_BCHW.dtype == torch.uint8
    return (found_BCHW.cpu().float() - expected_BCHW.float()).abs().mean(dim=(1, 2, 3))


class Opened:
    """Decoders with one pool; `decode` is begin and end in one."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self._decoders: list[DaliDecoder] = []

    def __call__(self, image: schema.Image = SMALL, batch_size: int = 8, device: torch.device = CPU) -> DaliDecoder:
        self._decoders.append(DaliDecoder(image, batch_size, schema.Decode("dali", threads=1), device))
        return self._decoders[-1]

    def decode(self, items: Sequence[Encoded], image: schema.Image = SMALL, device: torch.device = CPU) -> DecodedBatch:
        return self(image, max(1, len(items)), device).begin(items, self.pool)()

    def close(self) -> None:
        for decoder in self._decoders:
            decoder.close()
        self.pool.shutdown()


@pytest.fixture
def opened() -> Iterator[Opened]:
    made = Opened()
    yield made
    made.close()


def photographs() -> list[Encoded]:
    """Three photographs, large, middling and small, with chroma in full and halved."""
    data = pytest.importorskip("skimage.data")
    pictures = [data.astronaut(), data.chelsea(), data.coffee()]
    pictures += [np.asarray(PIL.Image.fromarray(whole).resize((130, 90))) for whole in pictures[:2]]
    return encoded(
        [
            simplejpeg.encode_jpeg(np.ascontiguousarray(whole), quality=quality, colorsubsampling=chroma)
            for whole in pictures
            for quality, chroma in ((95, "444"), (80, "420"))
        ]
    )


@pytest.mark.parametrize("size", [48, 224, 448])
@pytest.mark.parametrize("scale", [(0.1, 0.4), (0.9, 1.0)])
def test_photographs_are_near_the_cpu_path(opened, size, scale) -> None:
    image, items = schema.Image(size=size, crop_scale=scale, flip=True), photographs()
    found = opened.decode(items, image)
    assert not found.refused
    assert difference(found.images_BCHW, reference(items, image)).max() <= 0.3


def test_windows_are_right_to_the_pixel(opened) -> None:
    """Noise, and windows of the output's size, so that nothing is resampled: every orientation, mirrored and not."""
    noise = np.random.default_rng(1).integers(0, 256, (40, 56, 3)).astype(np.uint8)
    share = 16 * 16 / (40 * 56)
    image = schema.Image(size=16, crop_scale=(share, share), crop_ratio=(1.0, 1.0), flip=True)
    items = encoded(
        [encode(noise, quality=95, exif=exif(orientation)) for orientation in range(1, 9) for _ in range(6)]
    )
    found = opened.decode(items, image)
    assert torch.equal(found.images_BCHW, reference(items, image))


def test_every_exif_orientation_gives_the_same_upright_crop(opened) -> None:
    upright = picture(3, 48, 80)
    back = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    back |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    datas = [encode(upright, quality=98, subsampling=0)]
    for orientation, method in back.items():
        stored = PIL.Image.fromarray(upright).transpose(PIL.Image.Transpose[method])
        datas.append(encode(stored, quality=98, subsampling=0, exif=exif(orientation)))
    first = encoded(datas)[0]
    items = [item._replace(draws=first.draws) for item in encoded(datas)]
    assert {item.header.orientation for item in items} == set(range(1, 9))
    found = opened.decode(items, schema.Image(size=32, crop_scale=(0.3, 0.5)))
    assert difference(found.images_BCHW, found.images_BCHW[:1].expand(8, -1, -1, -1)).max() <= 1.5


def test_everyday_jpegs_are_near_the_cpu_path(opened) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (90, 70, 3)).astype(np.uint8)
    smooth = picture(5, 61, 83)
    without_jfif = bytearray(encode(smooth))
    del without_jfif[2 : 4 + int.from_bytes(without_jfif[4:6], "big")]
    items = encoded(
        [
            encode(PIL.Image.fromarray(smooth).convert("L")),
            encode(noise, progressive=True),
            encode(noise, optimize=True, restart_marker_blocks=2),
            bytes(without_jfif),
            encode(picture(1, 1, 1)),
            encode(picture(1, 2, 300)),
            encode(smooth, quality=95)[:-2] + bytes(40) + b"\xff\xd9",  # simplejpeg refuses these stray bytes
            *(
                simplejpeg.encode_jpeg(smooth, colorsubsampling=chroma)
                for chroma in ("444", "422", "420", "440", "411")
            ),
        ]
    )
    assert all(dali._for_dali(item.data, item.header) for item in items)
    found = opened.decode(items)
    assert not found.refused
    assert difference(found.images_BCHW, reference(items, SMALL)).max() <= 0.6


def other_kinds() -> dict[str, bytes]:
    whole = PIL.Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 40, 3)).astype(np.uint8))
    see_through = whole.copy()
    see_through.putalpha(PIL.Image.linear_gradient("L").resize(whole.size))
    sixteen_bits = PIL.Image.fromarray(np.linspace(0, 65535, 50 * 40).astype(np.uint16).reshape(50, 40))
    adobe_rgb = bytearray(encode(whole))
    adobe_rgb[2:2] = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
    return {
        "PNG": encode(whole, "PNG"),
        "PNG, transparent": encode(see_through, "PNG"),
        "PNG, palette": encode(whole.quantize(16), "PNG", transparency=3),
        "PNG, 16 bits": encode(sixteen_bits, "PNG"),
        "PNG, turned": encode(whole, "PNG", exif=exif(6)),
        "WebP": encode(whole, "WEBP"),
        "WebP, transparent": encode(see_through, "WEBP"),
        "WebP, animated": encode(whole, "WEBP", save_all=True, append_images=[whole.rotate(90)]),
        "GIF": encode(whole, "GIF"),
        "BMP": encode(whole, "BMP"),
        "TIFF": encode(whole, "TIFF"),
        "JPEG, CMYK": encode(whole.convert("CMYK")),
        "JPEG, stored as RGB": encode(whole, keep_rgb=True),
        "JPEG, marked as RGB": bytes(adobe_rgb),
    }


def test_other_kinds_equal_the_cpu_path(opened) -> None:
    items = encoded(list(other_kinds().values()))
    assert not any(dali._for_dali(item.data, item.header) for item in items)
    mixed = [*items, *encoded([jpeg(1)])]
    decoder = opened(batch_size=len(mixed))
    for batch in (items, mixed):  # the first leaves nothing to DALI
        found = decoder.begin(batch, opened.pool)()
        assert torch.equal(found.images_BCHW[: len(items)], reference(items, SMALL))
        assert difference(found.images_BCHW, reference(batch, SMALL)).max() <= 0.5
    assert not found.refused


def test_dali_gets_everyday_jpegs_without_exif_only() -> None:
    data = jpeg(1)
    frame = data.index(b"\xff\xc0")
    assert dali._for_dali(data, ImageHeader("JPEG", 4096, 8192))
    assert not dali._for_dali(data, ImageHeader("JPEG", 4096, 8193))
    for place, value in ((frame + 1, 0xC3), (frame + 1, 0xC9), (frame + 4, 12)):  # lossless, arithmetic, 12 bits
        changed = bytearray(data)
        changed[place] = value
        assert not dali._for_dali(bytes(changed), examine_image(bytes(changed), 10**8))
    stray = data[:2] + bytes(3) + data[2:]  # DALI's parser refuses the gap, which could end the process
    assert not dali._for_dali(stray, examine_image(stray, 10**8))
    described = encode(picture(1), exif=exif(6))
    plain = dali._for_dali(described, examine_image(described, 10**8))
    assert b"Exif" in described and plain and b"Exif" not in plain
    for end in range(2, data.index(b"\xff\xda") + 4):  # no walk leaves the data
        assert not dali._for_dali(data[:end], ImageHeader("JPEG", 24, 32))


def test_refused_pictures_cost_their_own_rows_only(opened) -> None:
    """Two batches are in flight when the first of them fails; a third begins behind the rebuild."""
    good = encoded([jpeg(number) for number in range(6)])
    broken = list(good)
    for b, item in zip((1, 4), encoded([undecodable_jpeg(1), undecodable_jpeg(2)]), strict=True):
        broken[b] = item
    png = bytearray(other_kinds()["PNG"])
    start = png.index(b"IDAT") + 12
    png[start : start + 60] = bytes(60)
    broken[5] = encoded([bytes(png)])[0]
    alone = opened.decode(good).images_BCHW

    decoder = opened()
    end_broken = decoder.begin(broken, opened.pool)
    end_second = decoder.begin(good[::-1], opened.pool)
    found = end_broken()
    end_third = decoder.begin(good[:2], opened.pool)
    assert sorted(found.refused) == [1, 4, 5]
    assert {error.cause for error in found.refused.values()} == {Cause.DECODE_FAILED}
    assert "DALI: Failed to decode" in found.refused[1].detail and "DALI" not in found.refused[5].detail
    assert torch.equal(found.images_BCHW[[0, 2, 3]], alone[[0, 2, 3]])
    assert not found.images_BCHW[[1, 4, 5]].any()
    assert torch.equal(end_second().images_BCHW, alone.flip(0))
    assert torch.equal(end_third().images_BCHW, alone[:2])
    assert decoder.rebuilds == 1

    end_first, end_broken = (decoder.begin(batch, opened.pool) for batch in (good, broken[:2]))
    assert torch.equal(end_first().images_BCHW, alone)
    assert sorted(end_broken().refused) == [1]
    assert decoder.rebuilds == 2


def test_what_only_dali_refuses_is_decoded_by_the_cpu_path(opened) -> None:
    """Its header promises more rows than there are, so that the window does not lie in the picture."""
    true, other = encoded([jpeg(1), jpeg(2)])
    items = [true._replace(header=ImageHeader("JPEG", 3 * true.header.height, true.header.width)), other]
    decoder = opened()
    found = decoder.begin(items, opened.pool)()
    assert decoder.rebuilds == 1 and not found.refused
    assert torch.equal(found.images_BCHW[:1], reference([true], SMALL))


def test_a_failure_that_no_row_explains_ends_the_run(opened, monkeypatch) -> None:
    decoder = opened()
    monkeypatch.setattr(decoder, "_refused_alone", lambda batch: {})
    end = decoder.begin(encoded([undecodable_jpeg(1)]), opened.pool)
    with pytest.raises(RuntimeError, match="Failed to decode"):
        end()


def test_pixels_depend_on_the_row_alone(opened) -> None:
    items = encoded([jpeg(number, 30 + number, 50 - number) for number in range(7)] + [other_kinds()["PNG"]])
    whole = opened.decode(items).images_BCHW
    assert torch.equal(opened.decode(items).images_BCHW, whole)
    decoder = opened()
    for batch in ([3], [7], [], [5, 0], [6, 7, 1, 2, 4]):
        found = decoder.begin([items[b] for b in batch], opened.pool)()
        assert torch.equal(found.images_BCHW, whole[batch])


def test_without_dali_the_error_says_what_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(dali, "dali_installed", lambda: False)
    with pytest.raises(DataError, match="decode.backend = dali: needs nvidia-dali-cuda130"):
        DaliDecoder(SMALL, 8, schema.Decode("dali"), CPU)


def test_loader_gives_the_same_batches_with_dali(make_loader, tmp_path) -> None:
    samples = [text_sample(number) for number in range(12)]
    samples[5][1]["jpg"] = undecodable_jpeg(5)
    pattern = str(write_tar(tmp_path / "train.tar", samples))
    taken = []
    for backend in ("cpu", "dali"):
        loader = make_loader(pattern, decode=schema.Decode(backend, threads=1))
        batches = loader.batches(loader.initial_state())
        taken.append([next(batches)[0] for _ in range(3)])
        batches.close()
    for cpu, by_dali in zip(*taken, strict=True):
        assert by_dali.stream_digests == cpu.stream_digests and by_dali.keys == cpu.keys
        assert torch.equal(by_dali.valid_B, cpu.valid_B)
        assert difference(by_dali.images_BCHW, cpu.images_BCHW).max() <= 0.6
    assert not all(batch.valid_B.all() for batch in taken[1])


@pytest.mark.gpu
@pytest.mark.parametrize("size", [48, 224])
def test_gpu_photographs_are_near_the_cpu_path(opened, size) -> None:
    image, items = schema.Image(size=size, crop_scale=(0.4, 1.0), flip=True), photographs()
    items += encoded([encode(picture(3, 60, 80), quality=95, exif=exif(turned)) for turned in range(1, 9)])
    items += encoded(list(other_kinds().values()))
    found = opened.decode(items, image, torch.device("cuda"))
    assert found.images_BCHW.device.type == "cuda" and found.images_BCHW.is_contiguous() and not found.refused
    assert difference(found.images_BCHW, reference(items, image)).max() <= 1.5


@pytest.mark.gpu
def test_gpu_refused_pictures_cost_their_own_rows_only(opened) -> None:
    items = encoded([jpeg(1), undecodable_jpeg(2), jpeg(3)])
    decoder = opened(device=torch.device("cuda"))
    ends = [decoder.begin(items, opened.pool), decoder.begin(items[::2], opened.pool)]
    found, second = (end() for end in ends)
    assert list(found.refused) == [1] and not second.refused and decoder.rebuilds == 1
    assert difference(found.images_BCHW[::2], reference(items[::2], SMALL)).max() <= 1.5
    assert torch.equal(found.images_BCHW[::2], second.images_BCHW)


@pytest.mark.gpu
def test_gpu_batches_come_beside_the_work_of_the_default_stream(opened) -> None:
    """A busy default stream neither delays a batch nor sees its memory reused under its hands."""
    items = encoded([jpeg(number, 200, 300) for number in range(16)])
    batches = [items[b:] + items[:b] for b in range(8)]
    decoder = opened(schema.Image(size=224), 16, torch.device("cuda"))
    expected = [decoder.begin(batch, opened.pool)().images_BCHW.cpu() for batch in batches]
    torch.cuda.synchronize()
    copies, busy = [], torch.cuda.Event()
    torch.cuda._sleep(20_000_000_000)  # 10 s and more of clock cycles
    busy.record()
    started = time.monotonic()
    for batch in batches:
        images_BCHW = decoder.begin(batch, opened.pool)().images_BCHW
        copies.append(images_BCHW.clone())  # queued behind the sleep; the batch itself is dropped at once
        del images_BCHW
    assert not busy.query() and time.monotonic() - started < 5
    for copy, truth in zip(copies, expected, strict=True):
        assert torch.equal(copy.cpu(), truth)
