"""Do hostile image files crash, stall or exhaust the reader of the data modules?

    python benchmarks/fuzz_images.py --files 20000

Small pictures of every format, mode and kind are mutated (flipped bits, cuts, spliced files, overwritten sizes and lengths, long
runs, chunks that decompress to much) and read in a child process with a limit of memory; a file that takes too long ends the
child. Each file is determined by the seed and its number. Results go to benchmarks/results/fuzz.json and fuzz.md.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import struct
import time
import zlib
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image, __version__

from uae.files.pictures import Reading, UnreadableImageError

RESULTS = Path(__file__).parent / "results"
READING = Reading(32, "crop")
SEED = 0
MODES = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "jpeg": ("L", "RGB", "CMYK"), "gif": ("L", "P", "RGB"),
    "webp": ("RGB", "RGBA"), "tiff": ("1", "L", "RGB", "RGBA", "CMYK", "I;16", "F"), "bmp": ("1", "L", "P", "RGB"),
    "ppm": ("1", "L", "RGB"),
}  # fmt: skip
TIFF = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")
TIFF_OF_MODE = {"1": ("group3", "group4"), "L": ("jpeg",), "RGB": ("jpeg",), "CMYK": ("jpeg",)}


def originals() -> list[tuple[str, bytes]]:
    """Whole files of every format and mode, animations and compressions among them: (format, bytes)."""
    noise = np.random.default_rng(SEED).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((48, 40))
    files = []
    for kind, modes in MODES.items():
        for mode in modes:
            image = picture.convert("L").convert(mode) if mode in ("I;16", "F") else picture.convert("RGB").convert(mode)
            options = [{"compression": name} for name in (*TIFF, *TIFF_OF_MODE.get(mode, ()))] if kind == "tiff" else [{}]
            options += [{"progressive": True}] if kind == "jpeg" else []
            options += [{"lossless": True}] if kind == "webp" else []
            if kind in ("gif", "webp", "png") and mode in ("P", "RGB", "RGBA"):
                options += [{"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}]
            files += [(kind, saved(image, kind, some)) for some in options]
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("jpeg", "png", "webp"):
        files.append((kind, saved(picture.convert("RGB"), kind, {"exif": exif, "icc_profile": b"\0" * 200})))
    return files


def saved(image: Image.Image, kind: str, options: dict) -> bytes:
    """The image as a file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def flipped(data: bytearray, draws: random.Random, others: list) -> bytearray:
    """Some bits are others."""
    for _ in range(draws.choice((1, 2, 4, 16, 64))):
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    return data


def header_flipped(data: bytearray, draws: random.Random, others: list) -> bytearray:
    """Some bytes of the header are others."""
    for _ in range(draws.choice((1, 2, 4, 8))):
        data[draws.randrange(min(128, len(data)))] = draws.choice((0, 1, 0x7F, 0x80, 0xFF, draws.randrange(256)))
    return data


def cut(data: bytearray, draws: random.Random, others: list) -> bytearray:
    """The end is missing."""
    return data[: draws.randrange(len(data))]


def spliced(data: bytearray, draws: random.Random, others: list) -> bytearray:
    """Its beginning, and the rest of another file of any format."""
    other = draws.choice(others)[1]
    return data[: draws.randrange(len(data))] + other[draws.randrange(len(other)) :]


def repeated(data: bytearray, draws: random.Random, others: list) -> bytearray:
    """A piece occurs many times."""
    first = draws.randrange(len(data))
    piece = data[first : first + draws.randrange(1, 64)]
    return data[:first] + piece * draws.choice((2, 50, 1000)) + data[first:]


def resized(data: bytearray, draws: random.Random, others: list) -> bytearray:
    """Numbers of 2 or 4 bytes are huge or zero, in either byte order."""
    for _ in range(draws.choice((1, 2, 3))):
        size = draws.choice("HI")
        top = 2 ** (8 * struct.calcsize(size)) - 1
        number = struct.pack(draws.choice("<>") + size, draws.choice((0, 1, top, top // 2, top // 2 + 1, 9000, 40000)))
        place = draws.randrange(min(256, len(data)))
        data[place : place + len(number)] = number
    return data


def declared(data: bytearray, draws: random.Random, others: list) -> bytearray:
    """A header with valid sums that promises a size the file does not hold: PNG and PPM; others as `resized`."""
    side = draws.choice((1, 3000, 9000, 13_000, 60_000, 2**31 - 1)), draws.choice((1, 3000, 9000, 2**31 - 1))
    if data.startswith(b"\x89PNG"):
        header = data[12:16] + struct.pack(">II", *side) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    if data[:1] == b"P":
        return bytearray(data[:3] + f"{side[0]} {side[1]}\n255\n".encode() + data[12:])
    return resized(data, draws, others)


def bombed(data: bytearray, draws: random.Random, others: list) -> bytearray:
    """Chunks that decompress to 64 MB: profile, text and pixels of PNG; others as `repeated`."""
    if not data.startswith(b"\x89PNG"):
        return repeated(data, draws, others)
    kind = draws.choice((b"iCCP", b"zTXt", b"iTXt", b"IDAT", b"eXIf"))
    body = {b"IDAT": BOMB, b"iTXt": b"k\0\1\0\0\0" + BOMB}.get(kind, b"k\0\0" + BOMB)
    chunk = kind + body
    return data[:33] + struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


BOMB = zlib.compress(bytes(2**26), 9)
MUTATIONS = (flipped, header_flipped, cut, spliced, repeated, resized, declared, bombed)


def mutated(number: int, files: list[tuple[str, bytes]], seed: int = SEED) -> tuple[str, str, bytes]:
    """Format, mutation and bytes of a file; the number says everything."""
    draws = random.Random(f"{seed}/{number}")
    kind, data = files[number % len(files)]
    mutation = draws.choice(MUTATIONS)
    return kind, mutation.__name__, bytes(mutation(bytearray(data), draws, files))


def outcome(content: bytes) -> str:
    """Whether it was read, or the first word of the reason; anything else that is raised is a finding."""
    try:
        image = READING(content)
    except UnreadableImageError as error:
        return str(error).split(":")[0].split(" ")[0]
    return "read" if image.shape == (3, 32, 32) and image.min() >= 0 and image.max() <= 1 else "WRONG"


def child(writer: Connection, numbers: range, limit_s: float, limit_bytes: int) -> None:
    """Read files and report each; the alarm's default action is to end the process, also inside a decoder."""
    files = originals()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff talks
    pages = int(Path("/proc/self/statm").read_text().split()[0])  # libraries are mapped already
    limit = pages * resource.getpagesize() + limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in numbers:
        kind, mutation, content = mutated(number, files)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        begin = time.perf_counter()
        try:
            result = outcome(content)
        except BaseException as error:  # the reader promises one kind of error
            result = f"RAISED {type(error).__name__}"
        seconds = time.perf_counter() - begin
        signal.setitimer(signal.ITIMER_REAL, 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        writer.send((number, kind, mutation, result, seconds, peak))


def run(count: int, limit_s: float, limit_bytes: int) -> list[tuple]:
    """All files; a child that dies is a result, and another one goes on behind the file that killed it."""
    rows: list[tuple] = []
    files = originals()
    spawn = multiprocessing.get_context("spawn")
    while len(rows) < count:
        reader, writer = spawn.Pipe(duplex=False)
        process = spawn.Process(target=child, args=(writer, range(len(rows), count), limit_s, limit_bytes))
        process.start()
        writer.close()
        try:
            while True:
                rows.append(reader.recv())
                if len(rows) % 1000 == 0:
                    print(f"{len(rows)} of {count}", flush=True)
        except EOFError:
            process.join()
        if len(rows) < count:
            death = "HANG" if process.exitcode == -signal.SIGALRM else f"CRASH {process.exitcode}"
            kind, mutation, _ = mutated(len(rows), files)
            rows.append((len(rows), kind, mutation, death, limit_s, 0))
    return rows


def finding(result: str) -> bool:
    """Whether this must not happen."""
    return result.startswith(("CRASH", "HANG", "RAISED", "WRONG"))


def report(rows: list[tuple], limit_s: float, limit_bytes: int, seconds: float) -> dict:
    """What came out, per format and altogether."""
    results = collections.Counter(row[3] for row in rows)
    slowest = max(rows, key=lambda row: row[4])
    table = {
        kind: {
            "files": len(some := [row for row in rows if row[1] == kind]),
            "read": sum(row[3] == "read" for row in some),
            "refused": sum(row[3] != "read" and not finding(row[3]) for row in some),
            "slowest_ms": round(1000 * max(row[4] for row in some)),
        }
        for kind in MODES
        if any(row[1] == kind for row in rows)
    }
    return {
        "files": len(rows), "pillow": __version__, "seed": SEED, "limit_s": limit_s, "limit_bytes": limit_bytes,
        "seconds": round(seconds), "hangs": results["HANG"], "crashes": sum(n for r, n in results.items() if "CRASH" in r),
        "other_errors": sum(n for r, n in results.items() if "RAISED" in r or r == "WRONG"),
        "out_of_memory": results["MemoryError"], "peak_bytes": max(row[5] for row in rows), "slowest": list(slowest[:5]),
        "originals_read": sum(outcome(content) == "read" for _, content in originals()), "originals": len(originals()),
        "results": dict(results.most_common()), "formats": table,
    }  # fmt: skip


def markdown(found: dict) -> str:
    """The report as a page."""
    lines = [
        f"{found['files']} mutated files, Pillow {found['pillow']}, at most {found['limit_s']:g} s and "
        f"{found['limit_bytes'] / 2**30:g} GiB of memory beyond the libraries: **{found['crashes']} crashes, {found['hangs']} hangs, "
        f"{found['out_of_memory']} out of memory, {found['other_errors']} errors of another kind.** Peak memory of the process "
        f"{found['peak_bytes'] / 2**20:.0f} MiB, slowest file {1000 * found['slowest'][4]:.0f} ms ({found['slowest'][1]}, "
        f"{found['slowest'][2]}). All {found['originals_read']} of {found['originals']} files are read before they are mutated.",
        "",
        "| format | files | still read | refused | slowest, ms |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {kind} | {' | '.join(str(value) for value in row.values())} |" for kind, row in found["formats"].items()]
    lines += ["", "| outcome | files |", "|---|---|", *(f"| {name} | {n} |" for name, n in found["results"].items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="per file")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of memory for the reading process, beyond its libraries")
    args = parser.parse_args()
    begin = time.perf_counter()
    limit = int(args.gigabytes * 2**30)
    found = report(run(args.files, args.seconds, limit), args.seconds, limit, time.perf_counter() - begin)
    (RESULTS / "fuzz.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "fuzz.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
