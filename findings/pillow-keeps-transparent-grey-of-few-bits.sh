#!/usr/bin/env bash
# Pillow takes the transparent grey of 2- and 4-bit PNGs for opaque.
#
# Seen with Pillow 13.0.0, Python 3.11. A grey PNG may name one of its values as transparent (the tRNS chunk), in the units of
# the file: 0 to 3 of 2 bits, 0 to 15 of 4. Pillow spreads such values over 0 to 255 when it decodes them, but leaves the
# named one as it is in `info["transparency"]` and compares the two, so that convert("RGBA") makes every pixel opaque,
# unless the named value is 0. Files of 1, 8 and 16 bits, made by the same writer, come out right. pypng, which decodes by itself,
# has the transparent pixels in all of them. `has_transparency_data` is true all along.
# What a library should do: ask whether info has a transparency at all, for pictures of these depths.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
# shellcheck disable=SC1091
. "$work/venv/bin/activate"
pip install -q --disable-pip-version-check pillow==13.0.0 pypng==0.20220715.0

python - <<'PY'
import io

import PIL
import png
from PIL import Image


def transparent(depth, key, row):
    """Which pixels of a row are, by Pillow and by pypng."""
    file = io.BytesIO()
    png.Writer(len(row), 1, greyscale=True, bitdepth=depth, transparent=key).write(file, [row])
    with Image.open(io.BytesIO(file.getvalue())) as picture:
        assert picture.has_transparency_data
        alpha = picture.convert("RGBA").getchannel("A").tobytes()
    _, _, (decoded, *_), _ = png.Reader(bytes=file.getvalue()).asRGBA8()
    return [a == 0 for a in alpha], [a == 0 for a in decoded[3::4]]


print(f"Pillow {PIL.__version__}")
for depth, key in ((1, 1), (2, 1), (2, 3), (4, 5), (8, 5), (16, 5)):
    row = [key, 0]
    pillow, other = transparent(depth, key, row)
    print(f"{depth:2} bits, grey {key} is transparent, pixels {row}: by Pillow {pillow}, by pypng {other}")
    assert other == [True, False]
    if (pillow == other) == (depth in (2, 4)):
        raise SystemExit(f"Pillow reads grey of {depth} bits otherwise now")
PY
