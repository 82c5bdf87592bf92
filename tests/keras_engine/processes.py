"""One of some JAX processes that pretrain together: `python processes.py OUT RANK COUNT PORT`."""

import sys

import jax

import simmim

if __name__ == "__main__":
    out, rank, count, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=rank)
    simmim.pretrain(
        data="demo",
        out=out,
        engine="keras",
        device="cpu",
        precision="fp32",
        model="vit_tiny_patch16_224",
        model_args={"depth": 2, "embed_dim": 48},
        image_size="32",
        mask_cell=16,
        batch_size=16,
        val_images=2,
        drop_path=0.1,
        steps=4,
        save_every_steps=2,
    )
