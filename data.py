"""Clips: from videos, from the data sets of the paper, made up from noise, and from a cache of a teacher's work.

Every data set is a function of one number. In training, `clips[n]` for n = 0, 1, 2, ... is an endless stream: file,
window, crop and flip, or the whole made-up scene, depend on the seed and on n alone. So a resumed run, or one on any
number of processes and workers, sees the same clips in the same order. train.py asks for n = step * batch + slot.
Clips are (3, T, H, W), float32, RGB in [-1, 1].
"""
import glob
import json
import os
import re
import shutil
import sys
import tempfile
from bisect import bisect
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from hashlib import sha256
from itertools import islice
from os.path import abspath, basename, exists, getsize, isdir, isfile, join, realpath, relpath
from pathlib import Path
from signal import SIG_IGN, SIGINT, SIGTERM, signal

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.random import default_rng
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.utils.data import BatchSampler, DataLoader, Dataset
from tqdm import tqdm


# ----------------------------------------------------------------------------------------------------------
# video files

SUFFIXES = tuple(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .wmv .flv .3gp .ogv .gif".split())
IMAGES = tuple(".jpg .jpeg .png .bmp .webp .tif .tiff".split())           # a folder of these is a video too
BROKEN = (av.FFmpegError, OSError, ValueError, MemoryError)     # all that PyAV raises on damaged files
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT     # else 2 levels off
MATRICES, UNTAGGED = (1, 4, 5, 6, 7, 9), (0, 2, 3)     # FFmpeg's numbers: what swscale undoes; no colours are named


class BadVideo(ValueError):
    """The clip asked for cannot be read from its file; the message is one line."""


def why(error):
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def open_video(path, **options):
    """A context manager. A colon in the name makes no address of it; a title in an unknown encoding does no harm."""
    try:
        return av.open(f"file:{path}", options=options)
    except UnicodeDecodeError:                                  # PyAV 18; later ones take any title, and no such word
        return av.open(f"file:{path}", options=options, metadata_errors="ignore")


def colours(frame):
    """FFmpeg's (matrix, primaries, transfer) of a frame; untagged: BT.709 from 720 rows on and of RGB, else BT.601."""
    matrix = frame.colorspace
    if matrix not in MATRICES:
        matrix = 1 if frame.height >= 720 or frame.format.is_rgb else 6
    primaries, transfer = {1: (1, 1), 9: (9, 14)}.get(matrix, (6, 6))
    primaries = primaries if frame.color_primaries in UNTAGGED else frame.color_primaries
    transfer = transfer if frame.color_trc in UNTAGGED else frame.color_trc
    return matrix, primaries, transfer


def picture(frame, **how):
    """A decoded frame as (H, W, 3) uint8 RGB, upright; how: of PyAV's reformat, such as width and height before it.

    Only the matrix is undone: swscale's conversion of primaries and transfer moves saturated colours by tens of levels.
    """
    matrix = None if frame.format.is_rgb else colours(frame)[0]
    matrix = 5 if matrix == 6 else matrix                                           # swscale's number of BT.601
    # All frames share one `reformat` in a process: a forked loader would wait for the threads of its parent's.
    rgb = VideoReformatter().reformat(frame, format="rgb24", interpolation=EXACT, src_colorspace=matrix, threads=1,
                                      **how)
    return np.ascontiguousarray(np.rot90(rgb.to_ndarray(), round(frame.rotation / 90)))    # phones store the angle


@cache
def warn_once(line):
    print(line, file=sys.stderr)


def check_colours(path, frame, tagged=False):
    """Warns, once a file, of colours that `picture` does not undo; tagged: what is made of it says its transfer."""
    _, primaries, transfer = colours(frame)
    kind = {16: "PQ", 18: "HLG"}.get(transfer, "BT.2020" if primaries == 9 else None)
    if frame.colorspace not in MATRICES + UNTAGGED:
        warn_once(f"{path}: its colours will be wrong: nothing here undoes matrix {frame.colorspace} (FFmpeg's number)")
    elif kind and not tagged:
        warn_once(f"{path} is {kind} video: its values are taken as they are, not converted to BT.709's")


def check_fields(path, frame):
    if frame.interlaced_frame:
        warn_once(f"{path} is interlaced: its frames are taken as they are, two fields in one picture")


def video_stream(container):
    """The first video stream that is not a cover picture, and its frame rate."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic and stream.codec_context:
            return stream, stream.average_rate or stream.guessed_rate or 25
    raise BadVideo("no video stream that can be decoded")


def visible(names, suffixes):
    """The names that end so; hidden files are nobody's input."""
    return [name for name in names if name.lower().endswith(suffixes) and name[0] != "."]


def image_files(path):
    """The images of a folder in the order of the numbers in their names, 2 before 10, or `path`, if it is one."""
    if not isdir(path):
        return visible([path], IMAGES)
    parts = lambda name: [int(part) if k % 2 else part for k, part in enumerate(re.split("([0-9]+)", name))]
    return [f"{path}/{name}" for name in sorted(visible(os.listdir(path), IMAGES), key=parts)]


def count_frames(path):
    """How many frames the file's header promises, or the folder holds; raises one of BROKEN if it is no video."""
    images = image_files(path)
    if images or isdir(path):
        return len(images)
    if not getsize(path):
        raise BadVideo("empty file")
    # Without a decoder FFmpeg cannot decode a first frame to learn more than we ask: 0.3 ms a file, not 10.
    with open_video(path, codec_whitelist="none") as container:
        stream, rate = video_stream(container)
        if stream.frames:                                       # an edit list hides some
            return stream.frames - sum(entry.is_discard for entry in stream.index_entries)
        seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
    return round(seconds * rate) or len(find_frames(path)[0])           # webm from a browser tells no length


@lru_cache(10_000)
def find_frames(path):
    """(time stamps of a file's frames in the order in which they are shown, time stamps of its key frames).
    Packets are read but not decoded. Where stamps do not tell frames apart there are no key frames, and frames are
    counted: AVI stamps packets in the order of decoding; the stamps of joined files jump back.
    """
    if images := image_files(path):
        return images, []
    shown, keys, order = [], [], []
    with open_video(path) as container:
        stream, _ = video_stream(container)
        for packet in container.demux(stream):
            if packet.size:
                stamp = packet.dts if packet.pts is None else packet.pts
                shown += [stamp] * (not packet.is_discard)
                keys += [stamp] * packet.is_keyframe
                order += [packet.dts] * (packet.dts is not None)
        by_packet = container.format.name == "avi" and stream.codec_context.has_b_frames
    if by_packet or None in shown + keys or len(set(shown)) < len(shown) or order != sorted(order):
        return range(len(shown)), []
    return np.sort(shown), sorted(keys)


def decode_from(path, start):
    """Yields a file's decoded frames from number `start` on; raises one of BROKEN where it is damaged."""
    stamps, keys = find_frames(path) if start else ([0], [])
    begin = stamps[start]                                       # a time stamp, or without key frames a number
    last = keys[1:bisect(keys, begin)][-1:]                     # key frame, unless it is the first one
    for key in (*last, None):                                   # None: from the start, without a seek
        with open_video(path) as container:
            stream, _ = video_stream(container)
            stream.codec_context.thread_count = 1               # the loader's workers are the parallelism
            if key is not None:
                container.seek(key, stream=stream)
            number, damaged = -1, False
            for packet in container.demux(stream):
                stamp = packet.dts if packet.pts is None else packet.pts
                if key is not None and (stamp != key or not packet.is_keyframe):
                    continue                                    # until the key frame, or the seek came out behind it
                key = None
                early = keys and stamp is not None and stamp < begin        # then not what no other frame needs
                stream.codec_context.skip_frame = "NONREF" if early else "DEFAULT"
                for frame in packet.decode():
                    number += 1
                    damaged = frame.is_corrupt or damaged and not frame.key_frame   # until the next key frame
                    place = (frame.pts or 0) if keys else number
                    if place >= begin:
                        if damaged:
                            raise BadVideo("damaged")
                        yield frame
            if key is None:
                return


def read_image(path):
    """(H, W, 3) uint8 RGB, upright."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":                           # Pillow would clip more than 8 bits to white
                raise BadVideo(f"images of 8 bits are needed, not mode {image.mode}")
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:                                  # Pillow raises many kinds
        raise BadVideo(f"{basename(path)}: {why(error)}") from None


def read_frames(path, start):
    """Yields frames from number `start` on, (H, W, 3) uint8 RGB; raises one of BROKEN where they are damaged."""
    if images := image_files(path):
        shape = None
        for name in images[start:]:
            image = read_image(name)
            shape = shape or image.shape
            if image.shape != shape:
                raise BadVideo(f"{basename(name)} is of another size than the images before it")
            yield image
        return
    for frame in decode_from(path, start):
        check_colours(path, frame)
        check_fields(path, frame)
        yield picture(frame)


@lru_cache(4)
def shuffled(n, *key):
    """The numbers below n in the order that `key` stands for; every worker draws the same."""
    return default_rng(key).permutation(n)


def find_videos(root, images=False):
    """Sorted paths below root of all videos and of folders that hold images but no video, or of images themselves; and
    of the files that are none of these."""
    seen, videos, others = set(), [], []
    for folder, below, names in os.walk(root, followlinks=True):
        real = realpath(folder)
        # Not below links that lead back, nor below . and @, which are what systems keep beside the files.
        below[:] = sorted(name for name in below if name[0] not in ".@" and real not in seen)
        if real not in seen:
            path_of = lambda name: relpath(f"{folder}/{name}", root)
            taken = visible(names, SUFFIXES + IMAGES * images)
            frames = [] if taken else visible(names, IMAGES)
            videos += map(path_of, taken or frames and [""])
            others += map(path_of, set(visible(names, "")).difference(taken, frames))
        seen.add(real)
    return sorted(videos), sorted(others)


def part_of(path):
    """A hash of the size of a file, or sizes of its images, and of a piece from the middle of it, or of the first."""
    files = image_files(path) or [path]
    sizes = list(map(getsize, files))
    with open(files[0], "rb") as file:
        file.seek(sizes[0] // 2)
        return sha256(json.dumps(sizes).encode() + file.read(4096)).hexdigest()


class VideoClips(Dataset):
    """Clips from a video or from all videos in a folder, at any depth: (3, frames, height, width).
    A video is a file, or a folder of its frames as images; with one frame a clip, every image is one.

    names    the videos of `root` to take, as relative paths, instead of all
    size     an int or (height, width): the largest crop of that shape, resized so that its short side fits exactly
    train    True: `clips[n]`, any n >= 0, is clip n of an endless stream. Every N clips go once through all N files
             in a new order. Window, crop and flip are drawn from (seed, n). A clip that cannot be decoded falls to
             the file's first window, then to the next files of that order: whatever was read before plays no role.
             False: `clips[i]`, i < N, is the first window of `files[i]`, centre crop, no flip, or BadVideo.

    len() is N, the files that can be used, sorted in `files`; `skipped` says of every other file why not. Both kinds of
    bad files are named once on stderr. Raises FileNotFoundError if there is no such folder and ValueError if it holds
    nothing usable; `clips[n]` raises RuntimeError if no file at all can be decoded.
    """

    def __init__(self, root, frames, size, train=True, seed=0, names=None):
        self.root, self.frames, self.train, self.seed = abspath(root), frames, train, seed
        self.size = (size, size) if isinstance(size, int) else size
        if not exists(root):
            raise FileNotFoundError(f"no video file or folder {root}")
        others = []
        if names is None:
            names, others = find_videos(root, images=frames == 1)
        if isfile(root) or names == ["."]:
            self.root, *names = os.path.split(self.root)
        with ThreadPoolExecutor(8) as pool:                     # opening waits for the disk, mostly
            self.known = dict(zip(names, pool.map(self.probe, names)))      # {name: (frames, hash) or why not}
        self.skipped = {name: reason for name, reason in self.known.items() if isinstance(reason, str)}
        self.files = [name for name in self.known if name not in self.skipped]
        lines = [f"skipping {name}: {reason}" for name, reason in self.skipped.items()]
        if len(lines) > 11:
            lines[10:] = [f"skipping {len(lines) - 10} more files"]
        if others:
            lines += [f"{root}: {len(others)} other files are left out, such as {others[0]}"]
        if lines and os.environ.get("RANK", "0") == "0":       # all processes of a run find the same
            print(*lines, sep="\n", file=sys.stderr)
        if not self.files:
            raise ValueError(f"no usable video in {root}: found {len(names)} and skipped them all; it takes {frames} "
                             f"frames or more, in {' '.join(SUFFIXES)} or folders of images")

    def probe(self, name):
        path = join(self.root, name)
        try:
            count = count_frames(path)
            return (count, part_of(path)) if count >= self.frames else f"{count} frames, {self.frames} needed"
        except BROKEN as error:
            return why(error)

    def subset(self, indices):
        """Keeps these of `files` only, and returns itself."""
        self.files = [self.files[i] for i in indices]
        return self

    def without(self, others):
        """Drops the files that the VideoClips `others` has too, links and copies, and returns itself."""
        taken = {others.known[name] for name in others.files}
        self.files = [name for name in self.files if self.known[name] not in taken]
        return self

    def fingerprint(self):
        counts, hashes = zip(*map(self.known.get, self.files))
        return sha256(json.dumps([self.files, counts, hashes]).encode()).hexdigest()

    def __len__(self):
        return len(self.files)

    def __getitem__(self, n):
        return self.find(n)[1]

    def describe(self, n):
        return self.find(n)[0]

    def find(self, n):
        if not self.train:
            return self.files[n], self.clip(n, 0, 0.5, 0.5)
        epoch, place = divmod(n, len(self))
        window, y, x, flip = default_rng((self.seed, 2, n)).random(4)
        for i in np.roll(shuffled(len(self), self.seed, 1, epoch), -place):
            try:
                video = self.clip(i, window, y, x)
                return self.files[i], video.flip(-1) if flip < 0.5 else video
            except BadVideo as error:
                warn_once(f"cannot decode {error}")
        raise RuntimeError(f"none of the {len(self)} videos in {self.root} can be decoded")

    def clip(self, i, window, y, x):
        """File i's clip at `window`, `y`, `x`, each in [0, 1): how far along the room there is. BadVideo names it."""
        name, start = self.files[i], 0
        path = join(self.root, name)
        try:
            if window:
                count = min(self.known[name][0], len(find_frames(path)[0]))     # headers may promise too much
                start = int(window * max(count - self.frames + 1, 1))
            images = [self.crop(image, y, x) for image in islice(read_frames(path, start), self.frames)]
            if len(images) < self.frames:
                raise BadVideo(f"only {len(images)} of {self.frames} frames could be read")
        except BROKEN as error:
            if not window:
                raise BadVideo(f"{name}: {why(error)}") from None
            video = self.clip(i, 0, y, x)
            warn_once(f"{name}: the first window stands in for those that cannot be decoded")
            return video
        return torch.stack(images, 1).float().div(127.5).sub(1).contiguous()

    def crop(self, image, y, x):
        """(H, W, 3) uint8 to (3, height, width) uint8: the largest crop of that shape at `y`, `x`, resized."""
        height, width, _ = image.shape
        tall, wide = self.size
        scale = min(height / tall, width / wide)
        h, w = max(1, round(scale * tall)), max(1, round(scale * wide))
        top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
        image = torch.from_numpy(image[top:top + h, left:left + w]).permute(2, 0, 1)[None]
        return F.interpolate(image, self.size, mode="bicubic", antialias=True)[0]


# ----------------------------------------------------------------------------------------------------------
# the paper's data sets

# name: (height and width the paper evaluates at, where the data set is to be had)
DATA_SETS = {
    "davis": ((512, 512), "https://davischallenge.org/davis2017/code.html, or by --download"),
    "ucf101": ((256, 256), "https://www.crcv.ucf.edu/data/UCF101.php, or by --download"),
    "vidgen": ((256, 256), "https://huggingface.co/datasets/Fudan-FUXI/VIDGEN-1M"),
    "openvid": ((360, 640), "https://huggingface.co/datasets/nkp37/OpenVid-1M"),
}
# name: (address, SHA-256) of each of its archives. No checksum of DAVIS's test-dev is published.
ARCHIVES = {
    "davis": [("https://data.vision.ee.ethz.ch/csergi/share/davis/DAVIS-2017-trainval-480p.zip",
               "e3d0b5b77c3d031b000a19e0e25e3e2cac65d183755601bc2cf066df1a2aa492")],
    "ucf101": [("https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip",
                "5c0d1a53b8ed364a2ac830a73f405e51bece7d98ce1254fd19ed4a36b224bd27"),
               ("https://storage.googleapis.com/thumos14_files/UCF101_videos.zip",
                "dabf56f573cd19c79e096563529fec8126a2a34e18e10c72eb621dd687532b0d")],
}


def split_names(root, split):
    """The lines of a split's file, wherever under `root` it lies, or of the file `split`."""
    lists = [split] if isfile(split) else sorted(
        glob.glob(f"{glob.escape(root)}/**/{split.removesuffix('.txt')}.txt", recursive=True))
    if not lists:
        raise FileNotFoundError(f"no split {split}: neither a file of that name nor {split}.txt under {root}")
    with open(lists[0]) as file:
        return [name for name in map(str.strip, file) if name]


def find_clips(data, root=None, split=None):
    """(folder, names) of the videos that `data` means, for VideoClips; names None for all in the folder.

    data     davis (its split test-dev where there is one, else val), ucf101 (testlist01, the 3,783 clips of the
             paper), vidgen, openvid, or a video or folder
    root     the folder where a name is looked for, instead of data/<name>
    split    another list of the data set's, or a text file with a name a line

    Raises FileNotFoundError that says where to get the videos.
    """
    folder = lists = str(root or (data if exists(data) else f"data/{data}"))
    if data == "davis":
        if isdir(f"{folder}/DAVIS"):                    # what the archive unpacks into
            folder += "/DAVIS"
        folder, lists = f"{folder}/JPEGImages/480p", f"{folder}/ImageSets/2017"
        split = split or ("test-dev" if exists(f"{lists}/test-dev.txt") else "val")
    if not exists(folder):
        source = f"; get it from {DATA_SETS[data][1]}" if data in DATA_SETS else ""
        raise FileNotFoundError(f"no videos called {data}: put them into the folder {folder}, "
                                f"or name the folder that holds them{source}")
    if data == "ucf101":    # The mirror has one folder for all classes. Lines for training end with a class's number.
        there = {basename(name): name for name in find_videos(folder)[0]}
        names = [re.sub(r"\s+\d+$", "", name) for name in split_names(folder, split or "testlist01")]
        return folder, [there.get(basename(name), name) for name in names]
    return folder, split_names(lists, split) if split else None


def download(data, root=None):
    """Fetches and unpacks davis (0.8 GB) or ucf101 (7 GB) into data/<name>, or `root`. Raises ValueError for other
    data sets, and OSError where an archive cannot be had or its checksum is another."""
    if data not in ARCHIVES:
        raise ValueError(f"--download fetches {' and '.join(ARCHIVES)}; {data} is to be had from {DATA_SETS[data][1]}")
    root = root or f"data/{data}"
    os.makedirs(root, exist_ok=True)
    for address, checksum in ARCHIVES[data]:
        print(f"fetching {address} into {root}", flush=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            archive = f"{folder}/archive.zip"
            try:
                torch.hub.download_url_to_file(address, archive, hash_prefix=checksum, progress=sys.stderr.isatty())
            except (OSError, RuntimeError) as error:            # the latter: of a wrong checksum
                raise OSError(f"{address} could not be fetched ({why(error)}): unpack it by hand in {root}") from None
            shutil.unpack_archive(archive, root)


# ----------------------------------------------------------------------------------------------------------
# made-up video

HELD_OUT_SEED = 10_000  # made-up clips of this seed are for evaluation: training steps over it
CLIPS_PER_SCENE = 8     # made-up clips that share one painted scene, since painting costs more than filming it


def pink_noise(rng, channels, size, slope):
    """(channels, size, size) noise of amplitude 1/f^slope, zero mean and unit variance a channel; size is even."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    amplitude = np.maximum(frequency, 1 / size) ** -slope
    amplitude[0, 0] = 0
    spectrum = rng.standard_normal((channels, size, size // 2 + 1, 2)).astype(np.float32).view(np.complex64)[..., 0]
    noise = np.fft.irfft2(spectrum * amplitude).astype(np.float32)
    return noise / noise.std((1, 2), keepdims=True)


def random_colours(rng, n):
    """(n, 3) colours whose brightness varies several times as much as their hue, as in photographs."""
    luma = rng.beta(1.2, 1.5, (n, 1))
    chroma = rng.standard_normal((n, 3)) * rng.gamma(1.2, 0.045, (n, 1))
    return (luma + chroma - chroma.mean(1, keepdims=True)).astype(np.float32)


def dead_leaves(rng, size):
    """(3, size, size) scene in about [0, 1]: overlapping ellipses and boxes of power-law sizes, each with a
    colour, a shading gradient and 1/f texture. Occlusion edges plus 1/f texture give the spectra and the
    sharp edges of natural images (Lee, Mumford and Huang 2001)."""
    texture = pink_noise(rng, 4, size, rng.uniform(0.7, 1.5))
    tint = 0.35 * (random_colours(rng, 4).T - 0.4)
    texture = np.tensordot(tint + 0.325 * rng.standard_normal(4).astype(np.float32), texture, 1)
    smooth = pink_noise(rng, 1, size, rng.uniform(1.6, 2.2))
    scene = random_colours(rng, 1).T[..., None] + 0.12 * smooth + 0.12 * texture
    n = rng.integers(80, 400)
    # sizes fall as r^-3 (scale invariance) between the smallest visible and half of the scene; large ones first
    low, high = rng.uniform(2, 6), size * rng.uniform(0.12, 0.4)
    u = rng.random(n)
    radius = np.sort((low ** -1.6 * (1 - u) + high ** -1.6 * u) ** (-1 / 1.6))[::-1]
    order = np.argsort(np.arange(n) + rng.standard_normal(n) * n * 0.2)
    palette = random_colours(rng, rng.integers(4, 24))
    colours = rng.choice(palette, n) + 0.04 * rng.standard_normal((n, 3)).astype(np.float32)
    contrast = rng.gamma(1.0, 0.08, n).astype(np.float32)
    centres, angles = rng.random((n, 2)) * size, rng.random(n) * np.pi
    aspects = np.exp(rng.normal(0, 0.7, n)).clip(0.1, 10) ** 0.5
    boxes, shading = rng.random(n) < 0.4, rng.normal(0, 0.12, (n, 2))
    place = np.arange(size, dtype=np.float32)
    for i in order:
        r, a = radius[i], aspects[i]
        reach = 1.42 * r * max(a, 1 / a)
        rows, columns = (slice(max(int(c - reach), 0), int(c + reach) + 2) for c in centres[i])
        y, x = place[rows, None] - centres[i, 0], place[columns] - centres[i, 1]
        c, s = np.cos(angles[i]) / r, np.sin(angles[i]) / r
        u, v = abs(c * x + s * y) * a, abs(c * y - s * x) / a
        distance = np.maximum(u, v) if boxes[i] else np.sqrt(u * u + v * v)
        mask = np.clip((1 - distance) * r + 0.5, 0, 1)     # one pixel of anti-aliasing
        shade = (shading[i, 0] * y / r + shading[i, 1] * x / r).astype(np.float32)
        fill = colours[i][:, None, None] + contrast[i] * texture[:, rows, columns] + shade
        area = scene[:, rows, columns]
        area += mask.astype(np.float32) * (fill - area)
    return torch.from_numpy(scene)


def motion(rng, frames, speed):
    """(frames, 2, 2) rotation-and-zoom matrices and (frames, 2) shifts in pixels of a smooth path whose speed
    is about `speed` pixels a frame: constant velocity, some acceleration, slow rotation and zoom."""
    t = torch.arange(frames)[:, None] - (frames - 1) / 2
    pace = min(speed * np.exp(rng.normal()) * (rng.random() > 0.15), 6.0)
    heading = rng.random() * 2 * np.pi
    velocity = torch.tensor([np.cos(heading), np.sin(heading)]) * pace
    bend = torch.from_numpy(rng.normal(0, 0.03, 2)) * pace
    shift = t * velocity + 0.5 * t ** 2 * bend
    turn, zoom = (rng.normal(0, most) * (rng.random() < 0.5) * t for most in (0.008, 0.006))
    c, s = zoom.exp() * turn.cos(), zoom.exp() * turn.sin()
    return torch.cat((c, -s, s, c), 1).view(-1, 2, 2), shift.float()


def film(image, points):
    """Samples `image` (C, M, M), periodic, at `points` (T, H, W, 2), in pixels (x, y): (T, C, H, W)."""
    size = image.shape[-1]
    grid = points.remainder(size) * (2 / size) - 1
    image = F.pad(image[None], (0, 1, 0, 1), mode="circular").expand(len(points), -1, -1, -1)
    share = size / (size + 1)
    grid = grid * share + (share - 1)                           # the wrapped row and column moved the centre
    return F.grid_sample(image, grid, align_corners=False, padding_mode="border")


class SyntheticClips(Dataset):
    """Endless made-up video with the statistics of natural images: 1/f textures and dead leaves under a panning camera,
    with objects that move by themselves and occlude what lies behind them.
    `clips[n]`, any n >= 0, is (3, frames, size, size) in [-1, 1], by `seed` and n only. `length`: for code that walks
    the set from start to end; `distinct`: after so many they come again.
    """

    def __init__(self, frames=8, size=64, seed=0, length=1_000_000, distinct=None):
        self.frames, self.size, self.seed, self.length, self.distinct = frames, size, seed, length, distinct or 2 ** 62

    def __len__(self):
        return self.length

    def describe(self, n):
        return f"made-up clip {n % self.distinct}"

    @lru_cache(2)
    def paint(self, number):
        """A scene, and the noise that gives objects their outlines."""
        scene = dead_leaves(default_rng((self.seed, 1, number)), 4 * self.size)
        return scene, torch.from_numpy(pink_noise(default_rng((self.seed, 3, number)), 1, 256, 1.8))

    def __getitem__(self, n):
        n = range(self.length)[n] % self.distinct
        rng = default_rng((self.seed, 2, n))
        scene, outlines = self.paint(n // CLIPS_PER_SCENE)
        if rng.random() < 0.5:
            scene = scene.flip(-1)
        if rng.random() < 0.5:
            scene = scene.mT
        if rng.random() < 0.3:
            scene = scene[rng.permutation(3)]
        # film at twice the size, then average: every pixel integrates over its area, as a camera's does
        size = 2 * self.size
        magnify = np.exp(rng.uniform(np.log(0.5), np.log(1.6)))     # scene pixels per filmed pixel
        axis = torch.arange(size) - (size - 1) / 2
        pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)

        def follow(speed, centre=0):
            """The filmed pixels' places along a path, where that begins in the scene, and what is seen there."""
            matrix, shift = motion(rng, self.frames, speed)
            start = torch.from_numpy(rng.random(2) * 2 * size).float()     # scenes are twice as large
            points = torch.einsum("tij,hwj->thwi", matrix, pixels) - 2 * shift[:, None, None] - centre
            return points, start, film(scene, points * magnify + start)

        _, _, video = follow(0.5)
        for _ in range(rng.choice(4, p=(0.3, 0.3, 0.25, 0.15))):       # objects, the nearest last
            centre = torch.from_numpy(rng.uniform(-0.4, 0.4, 2) * size).float()
            points, start, surface = follow(1.0, centre)
            extent = size * rng.uniform(0.08, 0.3)
            wobble = film(outlines, points * (48 / extent) + start)
            radius = torch.hypot(*points.unbind(-1))[:, None]
            mask = ((1 - radius / extent + 0.35 * wobble) * extent + 0.5).clamp(0, 1)
            tint = torch.from_numpy(rng.normal(0, 0.15, (3, 1, 1))).float()
            video = video + mask * (surface + tint - video)
        video = F.avg_pool2d(video, 2)
        if rng.random() < 0.3:                                        # out of focus
            video = F.avg_pool2d(F.pad(video, (1, 1, 1, 1), mode="replicate"), 3, 1)
        gain, drift = np.exp(rng.normal(0, 0.25)), rng.normal(0, 0.004)
        light = gain * torch.exp(drift * torch.arange(self.frames))[:, None, None, None]
        video = (video - 0.45) * light + 0.45 + rng.normal(0, 0.06)
        noise = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))
        video = video + abs(rng.normal(0, 0.008)) * torch.randn(video.shape, generator=noise)
        return (video.clamp(0, 1) * 2 - 1).movedim(1, 0).contiguous()


# ----------------------------------------------------------------------------------------------------------
# how alike two clips are

def frames_of(video):
    """(B, 3, T, H, W) in [-1, 1] -> (B T, 3, H, W) in [0, 1], clamped: what a screen can show of it."""
    return video.float().clamp(-1, 1).add(1).div(2).transpose(1, 2).flatten(0, 1)


def check_shapes(a, b):
    if a.shape != b.shape:
        raise ValueError(f"cannot compare clips of shapes {tuple(a.shape)} and {tuple(b.shape)}")


def psnr(a, b, most=np.inf):
    """PSNR in dB of each clip, (B,): the mean of its frames', with a peak of 1 in [0, 1]. a, b: (B, 3, T, H, W) in
    [-1, 1]. most: what a frame counts for at most, in dB; equal frames are infinite."""
    check_shapes(a, b)
    error = (frames_of(a) - frames_of(b)).square().mean((1, 2, 3))
    return (-10 * error.log10()).clamp(max=most).view(len(a), -1).mean(1)


# ----------------------------------------------------------------------------------------------------------
# what a teacher makes of clips, computed once

def write_file(path, data):
    """Writes bytes beside `path`, then renames: a file is whole, or is what was there before. Makes its folder."""
    partial = Path(f"{path}.{os.getpid()}.partial")             # another process may write the same
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def begin_worker(number):
    """For DataLoaders: their processes leave signals to the one that they serve, which may need them to finish."""
    signal(SIGINT, SIG_IGN)
    signal(SIGTERM, SIG_IGN)


class CachedClips(Dataset):
    """Clips with the teacher's latents and features, from files that a teacher filled once.
    `cache[n]`, any n >= 0, is a dict of tensors. Every `count` consecutive n are all entries, in a new order each time.
    Entry m holds clip m of a training stream (`video`, as uint8: what files hold) and what else `put` was given, in
    float16: one safetensors file, whole or missing, so that filling resumes.

    settings (str -> anything JSON holds) says whose cache it is. Raises ValueError if the folder's manifest says
    otherwise, or when an entry is damaged, which is then removed; OSError where the disk has no room.
    """

    def __init__(self, folder, count, settings, blocks=(), seed=0):
        self.folder, self.count, self.blocks, self.seed = Path(folder).absolute(), count, blocks, seed
        manifest = self.folder / "manifest.json"
        settings = settings | {"dtype": "float16", "entries": count, "blocks": list(blocks)}
        if not exists(manifest):
            if any(self.folder.glob("*")):
                raise ValueError(f"{folder} holds files but no cache's manifest.json: name an empty or a new folder")
            write_file(manifest, json.dumps(settings, indent=1).encode())
        try:                                                    # more entries and blocks than are needed do no harm
            made = self.made = json.loads(manifest.read_bytes())
            fits = {"entries": made["entries"] >= count, "blocks": set(blocks) <= set(made["blocks"])}
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{manifest} is damaged: delete the cache, or name another folder") from None
        for key, value in settings.items():
            if not fits.get(key, made.get(key) == value):
                raise ValueError(f"the cache {folder} was made with {key} {made.get(key)}, this run has {value}: "
                                 "delete it, or name another folder")

    def path(self, m):
        return self.folder / f"{m // 1000:05d}" / f"{m:08d}.safetensors"

    def put(self, m, video, tensors):
        """Writes entry m: a clip in [-1, 1] and {name: tensor}, scalars in float32."""
        entry = {"video": video.cpu().add(1).mul(127.5).round().byte().contiguous()}
        for name, t in tensors.items():
            entry[name] = t.to("cpu", torch.float16 if t.ndim else torch.float32).contiguous()
            if not entry[name].isfinite().all():
                raise ValueError(f"{name} of clip {m} does not fit into torch.float16: go without --cache")
        write_file(self.path(m), save(entry))

    def fill(self, clips, make, batch, rank=0, world=1, barrier=lambda: None, workers=0, say=print):
        """Makes what is missing of clips[m] for all m < count, this process the rank-th share of `world`.

        make([m, ...], clips (B, 3, T, H, W)) returns a dict of tensors for each clip. Always the same `batch` clips go
        together: which clips share a batch shows in the last bit of what is made.
        """
        missing = {m for m in range(self.count) if not exists(self.path(m))}
        say(f"the cache {self.folder}: {self.count} entries, {len(missing)} to make")
        barrier()                                               # all have seen the same ones missing
        groups = [group for group in BatchSampler(range(self.count), batch, False) if missing.intersection(group)]
        groups = groups[rank::world]
        loader = DataLoader(clips, batch_sampler=groups, num_workers=workers, worker_init_fn=begin_worker)
        for group, video in zip(groups, tqdm(loader, desc="cache", unit="batch", disable=rank > 0 or None)):
            for m, v, tensors in zip(group, video, make(group, video)):
                if m in missing:
                    self.put(m, v, tensors)
            if rank == 0 and group == groups[0]:
                size = getsize(self.path(m))
                say(f"{self.count} entries of {size / 1e6:.2f} MB")
                if len(missing) * size > shutil.disk_usage(self.folder).free:
                    raise OSError(f"the disk of the cache {self.folder} has no room for them")
        barrier()

    def describe(self, n):
        epoch, place = divmod(n, self.count)
        return str(self.path(shuffled(self.count, self.seed, 5, epoch)[place]))

    def __getitem__(self, n):
        path = Path(self.describe(n))
        try:
            entry = load(path.read_bytes())
            entry["video"] = entry["video"].float().div(127.5).sub(1)
        except (SafetensorError, ValueError, KeyError):
            path.unlink()                                       # `fill` makes anew what is not there
            raise ValueError(f"the cache's {path} was damaged and is removed: --resume makes it anew") from None
        return {name: t for name, t in entry.items() if name[:9] != "features." or name[9:] in self.blocks}
