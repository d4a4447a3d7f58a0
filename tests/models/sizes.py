"""Exact parameter counts of every named model, from the reference (sections 1.1, 1.9) and the libraries."""

PARAMETERS = {
  "dinov3_vits16": 21_601_152,
  "dinov3_vits16plus": 28_697_472,
  "dinov3_vitb16": 85_669_632,
  "dinov3_vitl16": 303_154_176,
  "dinov3_vitl16_sat": 303_156_224,
  "dinov3_vitl16plus": 403_915_776,
  "dinov3_vith16plus": 840_633_600,
  "dinov3_vit7b16": 6_716_043_264,
  "dinov3_convnext_tiny": 27_820_128,
  "dinov3_convnext_small": 49_454_688,
  "dinov3_convnext_base": 87_566_464,
  "dinov3_convnext_large": 196_230_336,
  "vit_small": 21_599_616,
  "vit_base": 85_666_560,
  "vit_large": 303_150_080,
  "vit_so400m": 415_406_592,
  "vit_huge2": 630_749_440,
  "vit_giant2": 1_134_571_008,
}
