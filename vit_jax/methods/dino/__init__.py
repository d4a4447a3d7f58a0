"""DINOv3 (Siméoni et al. 2025, arXiv 2508.10104): pretraining by self-distillation, and by a frozen teacher."""
