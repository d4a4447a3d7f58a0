"""vit_jax: Vision Transformers in JAX, above all DINOv3 self-supervised pretraining."""
