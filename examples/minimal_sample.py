"""In-Context LoRA's method in forty lines: panel 3 of a 2x2 set is made from the other three and the caption.

python -m examples.minimal_sample                 writes minimal.png, whose third panel is bit for bit that of
python sample.py --grid 2x2 --mask 3
"""

import torch

from iclora.layout import Layout, compose, generate_mask, paste
from model.position import grid_ids
from model.text import load_text_encoders
from model.weights import examples_folder, find_model, load_autoencoder, load_flux
from sampling.denoise import denoise
from sampling.flow import times
from sampling.images import fit, open_picture, to_picture
from sampling.inpaint import keep_known
from sampling.latents import noise, pack, unpack


@torch.inference_mode()
def main(path: str = "minimal.png") -> None:
    files, example, layout = find_model("tiny"), examples_folder() / "2x2", Layout(2, 2, 64, 64)
    flux = load_flux(files.flux, dtype=torch.float32)
    autoencoder = load_autoencoder(files.autoencoder)
    encoders = load_text_encoders(files, dtype=torch.float32)

    # the caption of all four panels
    txt, vec = encoders.encode([(example / "caption.txt").read_text().strip()], max_length=None)

    # the panels that are kept, as tokens; the one to make is grey and cannot leak in
    kept = {panel: fit(open_picture(example / f"{panel}.png"), 64, 64) for panel in (1, 2, 4)}
    known = pack(autoencoder.encode(compose(kept, layout)))  # (1, I, 64)
    mask = generate_mask([3], layout)  # (1, I, 1)

    # from noise to data along the velocity; after every step kept tokens go back onto their own straight path
    start = pack(noise(layout.height, layout.width, seed=0))  # (1, I, 64)
    ts, ids = times(20, tokens=start.shape[1]), grid_ids(8, 8)[None]
    x = denoise(flux, start, ts, ids, txt, vec, guidance=3.5, after_step=keep_known(known, start, mask))

    composite = to_picture(autoencoder.decode(unpack(x, 16, 16)))
    paste(composite, kept, layout).save(path)


if __name__ == "__main__":
    main()
