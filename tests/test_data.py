"""Clips: the same for the same seed and number whoever asks, the right frames and pixels, and no file that stops a run.

All videos are written here; grey level or colour tells which frame, place or file a pixel came from.
"""
import hashlib
import pickle
import shutil
import struct
import zlib
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import BadVideo, SyntheticClips, VideoClips, find_clips

LOSSLESS = ("ffv1", "bgr0", {})
# as cameras and editors write it: keyframes far apart, frames stored in another order than shown
H264 = ("libx264", "yuv420p", {"x264-params": "keyint=12:bframes=3:crf=4:log-level=none"})
VP9 = ("libvpx-vp9", "yuv420p", {"g": "12", "crf": "4", "deadline": "realtime", "cpu-used": "8"})


def write(path, images, kind=LOSSLESS, stamps=None, turn=0, title=""):
    """Writes images at these stamps, in 1/25 s, or at 0, 1, 2 ..."""
    codec, pixels, options = kind
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], pixels
        container.metadata["title"] = stream.metadata["title"] = title
        if turn:
            stream.set_display_rotation(turn)
        for stamp, image in zip(stamps or range(len(images)), images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = stamp
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(n, height=32, width=48):
    """n frames, each of one grey level that tells its number."""
    return [np.full((height, width, 3), 8 + 5 * k, np.uint8) for k in range(n)]


def numbers(clip):
    """The numbers of the frames of a clip from greys()."""
    level = ((clip.mean((0, 2, 3)) + 1) * 127.5 - 8) / 5
    assert (level - level.round()).abs().max() < 0.3
    return level.round().int().tolist()


def ramps(height=40, width=80):
    """Red tells x and green tells y, both rising by 2 a pixel; blue is 0."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = 2 * np.arange(width), 2 * np.arange(height)[:, None]
    return image


def texture(n, seed=0):
    """n frames of moving noise, which no decoder can guess when data is missing."""
    base = np.random.default_rng(seed).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    return [np.roll(base, 3 * k, 1) for k in range(n)]


def damage(path, low, high, fill=b"\0"):
    """Overwrites that part of the file, or cuts it off with fill=None."""
    content = bytearray(path.read_bytes())
    low, high = int(low * len(content)), int(high * len(content))
    content[low:] = fill * (high - low) + content[high:] if fill else b""
    path.write_bytes(content)
    return path


def load(clips, batches, workers):
    """The clips whose numbers train.py asks for, in one tensor."""
    return torch.cat(list(DataLoader(clips, batch_sampler=batches, num_workers=workers)))


@pytest.fixture
def folder(tmp_path):
    """Three videos; every frame, place and file differs from all others."""
    for k in range(3):
        write(tmp_path / f"{k}.mkv", texture(12 + k, seed=k))
    return tmp_path


# ----------------------------------------------------------------------------------------------------------
# which clip stands where

MAKERS = [lambda folder, seed=0: VideoClips(folder, frames=4, size=24, seed=seed),
          lambda folder, seed=0: SyntheticClips(4, 24, seed=seed)]


@pytest.mark.parametrize("make", MAKERS)
def test_a_clip_depends_on_seed_and_number_only(folder, make):
    clips, again, other = make(folder, 5), make(folder, 5), make(folder, 6)
    stream = torch.stack([clips[n] for n in range(12)])
    assert stream.shape == (12, 3, 4, 24, 24) and stream.dtype == torch.float32
    for n in (11, 3, 7, 0, 3):                                      # in any order, as after a resume
        assert torch.equal(again[n], stream[n])
    assert len({clip.numpy().tobytes() for clip in stream}) == 12
    assert not any(torch.equal(other[n], stream[n]) for n in range(12))
    assert torch.equal(pickle.loads(pickle.dumps(clips))[4], stream[4])     # how it reaches a spawned worker


@pytest.mark.parametrize("make", MAKERS)
def test_workers_and_processes_share_one_stream(folder, make):
    alone = load(make(folder), [[0, 1, 2, 3], [4, 5, 6, 7]], workers=0)
    assert torch.equal(alone, load(make(folder), [[0, 1, 2, 3], [4, 5, 6, 7]], workers=2))
    # two processes of a run, each with its slots of every step
    ranks = [load(make(folder), [[r, r + 1], [4 + r, 5 + r]], workers=0) for r in (0, 2)]
    assert torch.equal(alone, torch.cat([ranks[0][:2], ranks[1][:2], ranks[0][2:], ranks[1][2:]]))


def test_every_epoch_sees_every_file_once_in_its_own_order(tmp_path):
    for k in range(6):
        write(tmp_path / f"{k}.mkv", [np.full((16, 16, 3), 40 * k, np.uint8)] * 2)
    clips = VideoClips(tmp_path, frames=1, size=16)
    assert len(clips) == 6
    orders = {tuple(round((clips[6 * e + k].mean().item() + 1) * 127.5 / 40) for k in range(6)) for e in range(5)}
    assert len(orders) > 1 and all(sorted(order) == list(range(6)) for order in orders)


# ----------------------------------------------------------------------------------------------------------
# frames and pixels

@pytest.mark.parametrize("name, kind, first", [
    ("v.mkv", LOSSLESS, 0), ("v.mp4", H264, 0), ("v.mov", H264, 90), ("v.webm", VP9, 0)])
def test_windows_are_consecutive_frames_and_reach_both_ends(tmp_path, name, kind, first):
    write(tmp_path / name, greys(30), kind, range(first, first + 30))
    clips, starts = VideoClips(tmp_path, frames=9, size=16), set()
    for n in range(200):
        window = numbers(clips[n])
        assert window == list(range(window[0], window[0] + 9))
        starts.add(window[0])
    assert starts == set(range(30 - 8))
    # a resumed run of an older version goes on with the same clips
    assert [numbers(clips[n])[0] for n in range(6)] == [1, 11, 1, 11, 17, 17]
    assert numbers(VideoClips(tmp_path, frames=9, size=16, train=False)[0]) == list(range(9))
    assert numbers(VideoClips(tmp_path, frames=30, size=16)[0]) == list(range(30))      # no longer than is needed


def test_centre_crop_and_resize(tmp_path):
    write(tmp_path / "v.mkv", [ramps(40, 80)] * 2)

    def first(size):
        return (VideoClips(tmp_path, 1, size, train=False)[0][:, 0] + 1) * 127.5

    whole = first((40, 80))                                         # nothing to crop, nothing to resize
    assert torch.allclose(whole, torch.from_numpy(ramps(40, 80)).permute(2, 0, 1).float(), atol=1e-3)
    assert torch.allclose(first(40), whole[:, :, 20:60], atol=1e-3)
    for size, (height, width) in {20: (40, 40), (10, 20): (40, 80), (20, 10): (40, 20), 80: (40, 40)}.items():
        # a resized ramp is the same ramp at the centres of the new pixels, but for the filter at the borders
        h, w = (size, size) if isinstance(size, int) else size
        x = (80 - width) / 2 + (torch.arange(w) + 0.5) * width / w - 0.5
        y = (torch.arange(h) + 0.5) * height / h - 0.5
        red, green, blue = first(size)[:, 2:-2, 2:-2]
        assert (red - 2 * x[2:-2]).abs().max() < 1.6 and (green - 2 * y[2:-2, None]).abs().max() < 1.6
        assert blue.abs().max() < 1e-3


def test_random_crop_and_flip(tmp_path):
    write(tmp_path / "v.mkv", [ramps(40, 80)] * 3)
    clips, lefts, flips = VideoClips(tmp_path, 2, 40), set(), 0
    for n in range(150):
        red, green, _ = ((clips[n] + 1) * 127.5).round()
        assert torch.equal(green[0, :, 0], 2.0 * torch.arange(40))   # the short side is whole, and upright
        flipped = bool(red[0, 0, 0] > red[0, 0, 1])
        red = red.flip(-1) if flipped else red
        assert torch.equal(red, red[0, 0, 0] + 2.0 * torch.arange(40).expand(2, 40, 40))     # every frame alike
        lefts.add(int(red[0, 0, 0]) // 2)
        flips += flipped
    assert min(lefts) == 0 and max(lefts) == 40 and 50 < flips < 100


def test_resizing_is_antialiased_and_fills_minus_one_to_one(tmp_path):
    edge = np.zeros((32, 32, 3), np.uint8)
    edge[8:24, 8:24] = 255
    write(tmp_path / "edge.mkv", [edge] * 2)
    for size in (16, 32, 50):                                       # bicubic overshoots at edges
        clip = VideoClips(tmp_path / "edge.mkv", 1, size)[0]
        assert clip.min() == -1 and clip.max() == 1
    path = write(tmp_path / "v.mkv", [np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)] * 2)
    full, quarter = (VideoClips(path, 1, size, train=False)[0].std() for size in (64, 16))
    assert quarter < 0.4 * full                                     # the mean of 4 x 4 pixels; sampling keeps most


def test_phones_turn_their_pictures(tmp_path):
    image = np.zeros((32, 48, 3), np.uint8)
    # turned 90 degrees to the left, its right half is on top
    image[:, 24:] = 255
    write(tmp_path / "v.mp4", [image] * 3, H264, turn=90)
    clip = VideoClips(tmp_path, 1, (48, 32), train=False)[0]
    assert clip[:, :, :20].min() > 0.9 and clip[:, :, 28:].max() < -0.9


# (red's, blue's) part of luma in the standard's text
BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)


@pytest.mark.parametrize("tag, height, full, weights", [
    (1, 64, False, BT709), (5, 64, False, BT601), (6, 720, False, BT601), (9, 64, False, BT2020), (9, 64, True, BT2020),
    (2, 64, False, BT601), (0, 719, False, BT601), (3, 64, True, BT601), (2, 720, False, BT709),
    (0, 720, False, BT709)])
def test_colours_are_the_standards(tag, height, full, weights):
    """By FFmpeg's number of the matrix, else by the size."""
    y, u, v = 120, 100, 160
    frame = av.VideoFrame.from_ndarray(np.full((3, height, 64), [[[y]], [[u]], [[v]]], np.uint8), format="yuv444p")
    frame.colorspace, frame.color_range = tag, 2 if full else 1
    luma, chroma, (kr, kb) = (y, 1, weights) if full else ((y - 16) * 255 / 219, 255 / 224, weights)
    red, blue = luma + 2 * (1 - kr) * (v - 128) * chroma, luma + 2 * (1 - kb) * (u - 128) * chroma
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    assert np.abs(data.picture(frame) - np.array([red, green, blue])).max() < 1.5


@pytest.mark.parametrize("matrix, primaries, transfer, means, says", [
    (2, 2, 2, (6, 6, 6), None), (1, 2, 0, (1, 1, 1), None), (9, 3, 2, (9, 9, 14), "BT.2020"),
    (9, 9, 16, (9, 9, 16), "PQ"), (9, 9, 18, (9, 9, 18), "HLG"), (1, 9, 1, (1, 9, 1), "BT.2020"),
    (8, 1, 1, (6, 1, 1), "matrix 8"), (10, 9, 16, (6, 9, 16), "matrix 10")])
def test_colours_that_are_not_undone_are_said(tmp_path, capfd, matrix, primaries, transfer, means, says):
    frame = av.VideoFrame(64, 64, "yuv420p")
    frame.colorspace, frame.color_primaries, frame.color_trc = matrix, primaries, transfer
    assert data.colours(frame) == means
    data.check_colours(tmp_path, frame, tagged=True)
    assert bool(capfd.readouterr().err) == ("matrix" in (says or ""))
    data.warn_once.cache_clear()
    data.check_colours(tmp_path, frame)
    assert says in (line := capfd.readouterr().err) and line.count("\n") == 1 if says else not capfd.readouterr().err


def test_ten_bits_odd_sizes_a_long_name_and_a_title_in_an_unknown_encoding(tmp_path):
    write(tmp_path / "ten.mp4", greys(5, 32, 48), ("libx264", "yuv420p10le", {"crf": "4"}))
    write(tmp_path / "odd.mkv", greys(5, 33, 27))
    write(tmp_path / "deep" / "er" / "naïve 中.MKV", greys(5, 17, 31))
    path = write(tmp_path / "title.mkv", greys(5), title="ABCDEFGH")
    path.write_bytes(path.read_bytes().replace(b"ABCDEFGH", b"caf\xe9 \xff\xfe!"))
    clips = VideoClips(tmp_path, 5, 16, train=False)
    assert clips.files == ["deep/er/naïve 中.MKV", "odd.mkv", "ten.mp4", "title.mkv"]
    assert [numbers(clips[i]) for i in range(4)] == [[0, 1, 2, 3, 4]] * 4
    with pytest.raises(IndexError):
        clips[4]


def test_loaders_that_are_forked_from_a_process_that_holds_a_frame_end(tmp_path):
    """PyAV converts all frames of a thread by one converter, whose threads no forked process has."""
    path = write(tmp_path / "v.mkv", [np.zeros((720, 1280, 3), np.uint8)] * 4)
    with data.open_video(path) as container:
        frame = next(container.decode(video=0))
    frame.to_ndarray(format="rgb24")
    batches = DataLoader(VideoClips(path, 2, 16), batch_sampler=[[0], [1]], num_workers=2, timeout=60,
                         multiprocessing_context="fork")
    assert torch.cat(list(batches)).shape == (2, 3, 2, 16, 16)


# ----------------------------------------------------------------------------------------------------------
# bad files

def test_unusable_files_are_named_once_and_counted(tmp_path, capfd):
    good = write(tmp_path / "good.mkv", greys(12))
    (tmp_path / "empty.mp4").touch()
    damage(write(tmp_path / "cut.mp4", texture(12), H264), 0.6, 1, None)     # its index was at the end
    (tmp_path / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
    (tmp_path / "text.avi").write_text("not a video")
    (tmp_path / "notes.txt").write_text("nobody claims that this is one")
    write(tmp_path / "short.mkv", greys(8))
    write(tmp_path / "one.gif", greys(1), ("gif", "rgb8", {}))
    with av.open(str(tmp_path / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for _ in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clips = VideoClips(tmp_path, 9, 16)
    bad = {"empty.mp4", "cut.mp4", "garbage.mp4", "text.avi", "short.mkv", "one.gif", "audio.mp4"}
    assert clips.files == [good.name] and set(clips.skipped) == bad
    assert "empty" in clips.skipped["empty.mp4"] and "video stream" in clips.skipped["audio.mp4"]
    assert "8 frames" in clips.skipped["short.mkv"] and "9 needed" in clips.skipped["short.mkv"]
    load(clips, [[0, 1], [2, 3]], workers=2)
    lines = capfd.readouterr().err.splitlines()
    assert lines.pop() == f"{tmp_path}: 1 other files are left out, such as notes.txt"
    assert len(lines) == len(bad) and all(sum(name in line for line in lines) == 1 for name in bad)


def test_many_unusable_files_do_not_flood_the_screen(tmp_path, capfd):
    write(tmp_path / "good.mkv", greys(4))
    for k in range(40):
        (tmp_path / f"{k}.mp4").touch()
    assert len(VideoClips(tmp_path, 4, 16).skipped) == 40
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 11 and "30 more" in lines[-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_while_decoding_gives_way_to_the_next(tmp_path, capfd, workers):
    write(tmp_path / "good.mkv", texture(16, seed=1))
    write(tmp_path / "fine.mp4", texture(16, seed=2), H264)
    damage(write(tmp_path / "bad.mp4", texture(16), H264), 0.02, 0.9)        # the index at its end is whole
    clips = VideoClips(tmp_path, 4, 24)
    assert "bad.mp4" in clips.files                                 # the header says nothing
    batches = np.arange(18).reshape(6, 3).tolist()
    data.warn_once.cache_clear()
    stream = load(clips, batches, workers)
    lines = set(capfd.readouterr().err.splitlines())                # each process says it once
    assert stream.isfinite().all() and len(lines) == 1 and "bad.mp4" in lines.pop()
    assert {clips.describe(n) for n in range(18)} == {"good.mkv", "fine.mp4"}       # what stands in is named
    with pytest.raises(BadVideo, match="^bad.mp4: .+$"):
        VideoClips(tmp_path, 4, 24, train=False)[0]


def test_what_was_read_before_decides_nothing(folder, monkeypatch):
    """Of a file some windows can be decoded and others cannot: a clip may not depend on when that was noticed."""
    read_frames = data.read_frames

    def damaged_opening(path, start, *args):
        if path.endswith("0.mkv") and start < 5:
            raise BadVideo("damaged")
        return read_frames(path, start, *args)

    monkeypatch.setattr(data, "read_frames", damaged_opening)
    clips = VideoClips(folder, 4, 24)
    stream = [clips[n] for n in range(24)]
    assert all(torch.equal(VideoClips(folder, 4, 24)[n], stream[n]) for n in range(24))


def test_damage_in_the_middle_does_not_get_into_clips(tmp_path):
    whole = write(tmp_path / "v.mp4", texture(60), H264)
    truth = torch.from_numpy(np.stack(list(data.read_frames(str(whole), 0)))).float()
    damage(whole, 0.35, 0.5)
    clips = VideoClips(tmp_path, 4, (64, 96))
    for n in range(40):
        first = (clips[n][:, 0].permute(1, 2, 0) + 1) * 127.5
        error = torch.minimum((truth - first).abs().mean((1, 2, 3)), (truth - first.flip(1)).abs().mean((1, 2, 3)))
        assert error.min() < 1


def test_a_header_that_promises_too_much(tmp_path):
    damage(write(tmp_path / "v.mkv", texture(40)), 0.5, 1, None)    # about 20 frames are left
    clips = VideoClips(tmp_path, 10, 24)
    assert clips.known["v.mkv"][0] == 40
    assert all(clips[n].shape == (3, 10, 24, 24) for n in range(30))
    with pytest.raises(BadVideo, match="v.mkv: only .* of 30 frames"):
        VideoClips(tmp_path, 30, 24, train=False)[0]


def test_when_no_file_can_be_decoded_it_says_so_and_stops(tmp_path, monkeypatch, capfd):
    for k in range(4):
        damage(write(tmp_path / f"{k}.mp4", texture(16, k), H264), 0.02, 0.9)
    tries, read_frames = [], data.read_frames
    monkeypatch.setattr(data, "read_frames", lambda path, *args: (tries.append(path), read_frames(path, *args))[1])
    clips = VideoClips(tmp_path, 4, 24)
    for n in range(2):
        with pytest.raises(RuntimeError, match="none of the 4 videos"):
            clips[n]
    assert len(tries) <= 2 * 2 * 4                                  # the window and the first window, once a file
    assert len(capfd.readouterr().err.splitlines()) == 4


def test_nothing_to_read_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        VideoClips(tmp_path / "nowhere", 4, 16)
    write(tmp_path / "short.mkv", greys(3))
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ValueError) as error:
        VideoClips(tmp_path, 7, 16)
    line = str(error.value)
    assert "\n" not in line and str(tmp_path) in line and ".webm" in line and "7 frames" in line and "found 2" in line


def test_one_file_is_a_folder_of_one_and_hidden_files_are_nobodys_video(tmp_path):
    path = write(tmp_path / "v.mkv", greys(6))
    for hidden in ("._v.mkv", ".v.1234.mkv"):               # what macOS leaves on other disks, and half-written ones
        shutil.copy(path, tmp_path / hidden)
    assert VideoClips(tmp_path, 3, 16).files == ["v.mkv"]
    (tmp_path / "empty.mp4").touch()
    clips = VideoClips(path, 6, 16, train=False)
    assert clips.files == ["v.mkv"] and numbers(clips[0]) == list(range(6)) and not clips.skipped


MPEG = {"g": "24", "global_quality": "240", "flags": "+qscale"}
X264, LONG = "keyint=24:bframes=3:crf=4:log-level=none", "keyint=400:min-keyint=400:scenecut=0:crf=4:log-level=none"
RAMPS = {   # name: (codec, options, time stamps of the frames in 1/25 s or None for 0, 1, 2 ...)
    "avi of h264.avi": ("libx264", {"x264-params": X264}, None),
    "avi of mpeg4.avi": ("mpeg4", MPEG | {"bf": "2"}, None),
    "avi that begins late.avi": ("mpeg4", MPEG, range(50, 150)),
    "one key frame.ts": ("libx264", {"x264-params": f"{LONG}:bframes=3"}, None),
    "hevc.ts": ("libx265", {"x265-params": LONG}, None),
    "open groups.mkv": ("libx264", {"x264-params": f"{X264}:open-gop=1"}, None),
    "late.mpg": ("mpeg2video", MPEG | {"bf": "2"}, range(300, 400)),
    "variable.mp4": ("libx264", {"x264-params": X264}, [k if k < 50 else 5 * k - 200 + k % 3 for k in range(100)]),
}


@pytest.mark.parametrize("name", RAMPS)
def test_windows_are_exact_in_any_container_and_at_any_rate(tmp_path, name):
    """The numbers of frames are told by their grey levels, which rise by two."""
    codec, options, stamps = RAMPS[name]
    write(tmp_path / name, [np.full((64, 96, 3), 16 + 2 * k, np.uint8) for k in range(100)],
          (codec, "yuv420p", options), stamps)
    levels = np.array([image.mean() for image in data.read_frames(str(tmp_path / name), 0)])
    assert np.diff(levels).min() > 0.9 and abs(levels - np.arange(16, 216, 2)).max() < 2
    number_of = lambda image: int(abs(levels - float(image.mean())).argmin())
    for start in range(0, 90, 3):
        read = list(islice(data.read_frames(str(tmp_path / name), start), 10))
        assert [number_of(image) for image in read] == list(range(start, start + 10))
    clips, starts = VideoClips(tmp_path, 8, 16), set()
    for n in range(60):
        first = number_of((clips[n][:, 0] + 1) * 127.5)
        assert [number_of((image + 1) * 127.5) for image in clips[n].unbind(1)] == list(range(first, first + 8))
        starts.add(first)
    assert len(starts) > 30 and max(starts) > 70


# ----------------------------------------------------------------------------------------------------------
# made-up video

def test_made_up_clips_are_what_the_shipped_weights_were_trained_on():
    """Means, deviations, motion and detail of four clips, rounded: they hold on other CPUs, too."""
    for kind, n, want in (
            (dict(frames=8, size=64), 0, [-0.3178, 0.2897, 0.2466, 0.0889, 0.0639]),
            (dict(frames=8, size=64), 17, [-0.2183, 0.4389, 0.3861, 0.0456, 0.0605]),
            (dict(frames=5, size=48, seed=10_000), 3, [-0.0977, 0.4398, 0.2933, 0.0106, 0.0956]),
            (dict(frames=3, size=24, seed=7), 100, [-0.2998, 0.5302, 0.3062, 0.1469, 0.2167])):
        clip = SyntheticClips(**kind)[n].double()
        got = [clip.mean(), clip.std(), clip[:, 0, 5].std(), (clip[:, 1:] - clip[:, :-1]).abs().mean(),
               (clip[..., 1:] - clip[..., :-1]).abs().mean()]
        assert [x.item() for x in got] == pytest.approx(want, abs=1e-4)


def test_made_up_clips_look_like_video():
    clips = SyntheticClips(frames=5, size=64)
    stream = torch.stack([clips[8 * n] for n in range(12)])         # twelve scenes
    assert stream.shape == (12, 3, 5, 64, 64) and stream.dtype == torch.float32
    assert stream.min() >= -1 and stream.max() <= 1 and stream.std() > 0.2
    moved = (stream[:, :, 1:] - stream[:, :, :-1]).abs().mean((1, 2, 3, 4))
    assert moved.mean() > 0.01 and (moved > 0.003).float().mean() > 0.7     # most move, some cameras stand still
    # but neighbouring frames resemble each other more than other clips' frames do
    assert moved.mean() < 0.5 * (stream - stream.roll(1, 0)).abs().mean()
    # natural images: power falls as about 1/f^2 (averaged radially, between 3 and 20 cycles a picture)
    window = torch.hann_window(64)[:, None] * torch.hann_window(64)
    grey, f, r = stream.mean(1).flatten(0, 1), torch.fft.fftfreq(64) * 64, torch.arange(3, 21)
    power = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * window).abs().square()
    radius = f[:, None].hypot(f).round()
    radial = torch.stack([power[:, radius == k].mean(1) for k in r], 1).clamp_min(1e-12).log().mean(0)
    assert -3.2 < np.polyfit(r.log().numpy(), radial.numpy(), 1)[0] < -1.2


# ----------------------------------------------------------------------------------------------------------
# folders of frames, and the paper's data sets

def write_frames(folder, images, name="{:05d}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for n, image in enumerate(images):
        Image.fromarray(image).save(folder / name.format(n))
    return folder


def test_a_folder_of_frames_is_a_video(tmp_path):
    write_frames(tmp_path / "a" / "unpadded", greys(12), "frame {}.png")        # 10 comes after 9, not after 1
    write(tmp_path / "b.mkv", greys(12))
    clips = VideoClips(tmp_path, 5, 32, train=False)
    assert clips.files == ["a/unpadded", "b.mkv"]
    assert numbers(clips[0]) == [0, 1, 2, 3, 4] and (clips[0] - clips[1]).abs().max() < 0.01
    stream = VideoClips(tmp_path / "a", 9, 32)
    seen = {tuple(numbers(stream[n])) for n in range(60)}
    assert seen == {tuple(range(start, start + 9)) for start in range(4)}        # every window of 9 of the 12
    (tmp_path / "a" / "unpadded" / ".thumbnails").mkdir()
    alone = VideoClips(tmp_path / "a" / "unpadded", 12, 32, train=False)         # named itself
    assert alone.files == ["unpadded"] and numbers(alone[0]) == list(range(12))


def test_pictures_beside_videos_are_no_video(tmp_path, capfd):
    write(tmp_path / "clip.mkv", greys(12))
    Image.fromarray(greys(1)[0]).save(tmp_path / "cover.png")
    write_frames(tmp_path / "more", greys(1), "poster.png")
    write(tmp_path / "more" / "below" / "clip.mkv", greys(12))
    clips = VideoClips(tmp_path, 2, 32, train=False)
    assert clips.files == ["clip.mkv", "more/below/clip.mkv"] and clips.skipped == {"more": "1 frames, 2 needed"}
    assert "1 other files are left out, such as cover.png" in capfd.readouterr().err


def png(kind, held):
    return struct.pack(">I", len(held)) + kind + held + struct.pack(">I", zlib.crc32(kind + held))


HUGE = (b"\x89PNG\r\n\x1a\n" + png(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
        + png(b"IDAT", b"") + png(b"IEND", b""))


@pytest.mark.parametrize("spoil, message", [
    (lambda path: path.write_bytes(path.read_bytes()[:60]), "00001.png: "),
    (lambda path: path.write_text("no picture"), "00001.png: cannot identify"),
    (lambda path: Image.fromarray(np.full((32, 48), 40000, np.uint16)).save(path), "8 bits are needed, not mode I;16"),
    (lambda path: path.write_bytes(HUGE), "00001.png: Image size"),
    (lambda path: Image.fromarray(greys(1, 40, 40)[0]).save(path), "00001.png is of another size than the images"),
])
def test_a_frame_that_cannot_be_read_is_named_and_its_folder_gives_way(tmp_path, spoil, message):
    for name in ("clip", "fine"):
        write_frames(tmp_path / name, greys(4))
    spoil(tmp_path / "clip" / "00001.png")
    with pytest.raises(BadVideo, match=f"clip: .*{message}") as error:
        VideoClips(tmp_path, 4, 32, train=False)[0]
    assert "\n" not in str(error.value)
    clips = VideoClips(tmp_path, 4, 32)
    assert all(clips[n].shape == (3, 4, 32, 32) and clips.describe(n) == "fine" for n in range(4))


def davis(root, **splits):
    """DAVIS-2017's layout with four sequences."""
    for k, name in enumerate(("bear", "camel", "dance", "swan")):
        write_frames(root / "JPEGImages" / "480p" / name, [np.full((48, 80, 3), 40 * k, np.uint8)] * 9, "{:05d}.jpg")
        write_frames(root / "Annotations" / "480p" / name, greys(9))
    (root / "ImageSets" / "2017").mkdir(parents=True)
    for split, names in splits.items():
        (root / "ImageSets" / "2017" / f"{split.replace('_', '-')}.txt").write_text("\n".join(names) + "\n")


def test_davis_is_its_split(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    davis(tmp_path / "data" / "davis" / "DAVIS", train=["bear"], val=["swan", "camel", "gone"])
    folder, names = find_clips("davis")
    clips = VideoClips(folder, 9, 48, train=False, names=names)
    assert clips.files == ["swan", "camel"] and clips[1].mean().item() == pytest.approx(40 / 127.5 - 1, abs=0.02)
    assert list(clips.skipped) == ["gone"] and "skipping gone: " in capfd.readouterr().err
    assert find_clips("davis", split="train")[1] == ["bear"]
    (tmp_path / "mine.txt").write_text("dance\n\nin two words \n")
    assert find_clips("davis", split="mine.txt")[1] == ["dance", "in two words"]
    davis(tmp_path / "elsewhere", test_dev=["dance"], val=["swan"])
    assert find_clips("davis", root="elsewhere")[1] == ["dance"]
    with pytest.raises(FileNotFoundError, match="no split test: "):
        find_clips("davis", split="test")


@pytest.mark.parametrize("place", ["UCF-101/Archery", "UCF101"])       # as released, as mirrored
def test_ucf101_is_its_test_split(tmp_path, place):
    for n in (1, 2, 3):
        write(tmp_path / place / f"v_Archery_g0{n}_c01.mkv", greys(6))
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "testlist01.txt").write_text("Archery/v_Archery_g01_c01.mkv\r\nArchery/v_Archery_g03_c01.mkv\r\n")
    (lists / "trainlist01.txt").write_text("Archery/v_Archery_g02_c01.mkv 1\n")
    for split, want in ((None, ["g01", "g03"]), ("trainlist01", ["g02"])):
        folder, names = find_clips("ucf101", root=tmp_path, split=split)
        assert VideoClips(folder, 6, 32, train=False, names=names).files == [
            f"{place}/v_Archery_{g}_c01.mkv" for g in want]


def test_other_data_is_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "openvid" / "a.mkv", greys(6))
    assert (find_clips("openvid") == ("data/openvid", None)
            and find_clips("data/openvid/a.mkv") == ("data/openvid/a.mkv", None))
    for data, message in (("ucf101", "UCF101.php, or by --download"), ("vidgen", "VIDGEN-1M$"),
                          ("mine", "holds them$")):
        with pytest.raises(FileNotFoundError, match=message):
            find_clips(data)
    (tmp_path / "data" / "davis").mkdir()
    with pytest.raises(FileNotFoundError, match="into the folder data/davis/JPEGImages/480p"):
        find_clips("davis")


def test_an_archive_is_fetched_checked_and_unpacked(tmp_path, monkeypatch):
    davis(tmp_path / "made" / "DAVIS", val=["swan"])
    archive = Path(shutil.make_archive(str(tmp_path / "davis"), "zip", tmp_path / "made"))
    address, sha256 = archive.as_uri(), hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(data, "ARCHIVES", {"davis": [(address, sha256)]})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "davis" / "DAVIS" / "ImageSets" / "2017").mkdir(parents=True)
    # test-dev was there
    (tmp_path / "data" / "davis" / "DAVIS" / "ImageSets" / "2017" / "test-dev.txt").write_text("bear\n")
    data.download("davis")
    assert find_clips("davis")[1] == ["bear"] and find_clips("davis", split="val")[1] == ["swan"]
    assert VideoClips(*find_clips("davis")[:1], 9, 48, train=False, names=["swan"])[0].shape == (3, 9, 48, 48)
    assert [entry.name for entry in (tmp_path / "data" / "davis").iterdir()] == ["DAVIS"]

    monkeypatch.setattr(data, "ARCHIVES", {"davis": [(address, "0" * 64)]})
    with pytest.raises(OSError, match="could not be fetched .invalid hash value"):
        data.download("davis", "other")
    assert not list((tmp_path / "other").iterdir())
    monkeypatch.setattr(data, "ARCHIVES", {"davis": [("file:///nowhere.zip", sha256)]})
    with pytest.raises(OSError, match="could not be fetched .* by hand"):
        data.download("davis", "other")


# ----------------------------------------------------------------------------------------------------------
# links, fingerprints, single images, a cache

def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "a" / "clip.mkv", greys(4))
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    write(tmp_path / "elsewhere" / "far.mkv", greys(4))
    (tmp_path / "a" / "far").symlink_to(tmp_path / "elsewhere")
    assert data.find_videos(tmp_path / "a") == (["clip.mkv", "far/far.mkv"], [])


def test_a_fingerprint_tells_files_by_what_they_hold(tmp_path):
    write(tmp_path / "a" / "x.mkv", greys(4))
    write_frames(tmp_path / "a" / "frames", greys(4), "{}.png")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    print_of = lambda name: VideoClips(tmp_path / name, 4, 16).fingerprint()
    assert print_of("a") == print_of("b")
    held = (tmp_path / "b" / "x.mkv").read_bytes()
    middle = len(held) // 2 + 100
    (tmp_path / "b" / "x.mkv").write_bytes(held[:middle] + bytes([held[middle] ^ 1]) + held[middle + 1:])
    assert print_of("a") != print_of("b")
    (tmp_path / "b" / "x.mkv").write_bytes(held)
    Image.fromarray(greys(9)[8]).save(tmp_path / "b" / "frames" / "0.png")
    assert print_of("a") != print_of("b")


def test_with_one_frame_a_clip_every_image_is_one(tmp_path):
    write_frames(tmp_path / "a", greys(3), "{}\u00b20.png")                  # a digit that int() does not take
    Image.fromarray(greys(5)[4]).save(tmp_path / "top.webp", lossless=True)
    clips = VideoClips(tmp_path, 1, 16, train=False)
    assert clips.files == ["a/0\u00b20.png", "a/1\u00b20.png", "a/2\u00b20.png", "top.webp"]
    assert [numbers(clips[i]) for i in range(4)] == [[0], [1], [2], [4]]


def test_a_complete_cache_is_only_read(tmp_path):
    clips = SyntheticClips(2, 16)
    make = lambda numbers, video: [{"latents": torch.full((1, 1), float(m))} for m in numbers]
    data.CachedClips(tmp_path, 5, {}).fill(clips, make, 2)
    state = lambda: {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))}    # folders, too
    before = state()
    cache = data.CachedClips(tmp_path, 5, {})
    cache.fill(clips, None, 3)                                              # makes nothing, so needs no teacher
    assert sorted(cache[n]["latents"].item() for n in range(5)) == [0, 1, 2, 3, 4] and state() == before
