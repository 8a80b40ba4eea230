"""Pictures for the training log: the histogram of layers, and whatever else is drawn, to TensorBoard."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from transformers.integrations import TensorBoardCallback

HISTOGRAM_HEIGHT, BAR_WIDTH, MARGIN = 200, 28, 24
BAR_COLOR = (52, 101, 164)


def draw_histogram(shares: list[float]) -> Image.Image:
    """
    Bars of the share of segments that left at each layer.

    Args:
        shares: of layers 0 to L, in 0..1.

    Returns:
        An RGB picture; the highest bar fills it and bears its percentage.
    """
    picture = Image.new("RGB", (2 * MARGIN + BAR_WIDTH * len(shares), HISTOGRAM_HEIGHT + 2 * MARGIN), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    highest, floor = max(shares, default=0.0), MARGIN + HISTOGRAM_HEIGHT
    for layer, share in enumerate(shares):
        left = MARGIN + BAR_WIDTH * layer
        top = floor - (round(HISTOGRAM_HEIGHT * share / highest) if highest > 0 else 0)
        if top < floor:
            pen.rectangle((left + 2, top, left + BAR_WIDTH - 3, floor), fill=BAR_COLOR)
        pen.text((left + BAR_WIDTH / 2, floor + 4), str(layer), fill="black", font=font, anchor="mt")
        if share == highest and highest > 0:
            pen.text((left + BAR_WIDTH / 2, top - 3), f"{share:.0%}", fill="black", font=font, anchor="mb")
    pen.line((MARGIN, floor, picture.width - MARGIN, floor), fill="black")
    return picture


def send_pictures(callbacks: list, pictures: dict[str, Image.Image], step: int) -> None:
    """Hand pictures to the TensorBoard writers among a trainer's callbacks, where there are any."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            for name, picture in pictures.items():
                callback.tb_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
