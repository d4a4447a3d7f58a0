"""The DINOv3 pretraining step in PyTorch: the peer of `vit-jax bench step`, written for it.

Idiomatic PyTorch: scaled_dot_product_attention, fused AdamW, one foreach EMA, one linear map for q, k and v, stochastic
depth that skips the compute of the rows it drops, torch.compile if asked for. The work is that of one step of
`vit_jax.methods.dino.dinov3`: teacher on two global crops, student on masked global and on local crops, two heads,
Sinkhorn-Knopp, DINO, iBOT and KoLeo losses, clipping per sub-module, AdamW, EMA. Images, masks and weights are random.
`torch_peer.py` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rope_table(side: int, head_dim: int, scale: Tensor) -> tuple[Tensor, Tensor]:
  """Sine and cosine [N, d] of axial rotary positions with base 100, of coordinates times `scale` [1]."""
  periods = 100.0 ** (torch.arange(head_dim // 4, device=scale.device) * 4.0 / head_dim)  # [d/4]
  line = (2.0 * (torch.arange(side, device=scale.device) + 0.5) / side - 1.0) * scale  # [side]
  grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)  # [N, 2]
  angles = (2 * math.pi * grid[:, :, None] / periods).flatten(1).tile(2)  # [N, d]
  return angles.sin(), angles.cos()


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
  """Rotates the last N tokens of [B, H, T, d]."""
  prefix = x.shape[-2] - sin.shape[0]
  patches = x[:, :, prefix:]
  first, second = patches.chunk(2, dim=-1)
  turned = patches * cos + torch.cat([-second, first], dim=-1) * sin
  return torch.cat([x[:, :, :prefix], turned], dim=2)


class Attention(nn.Module):
  def __init__(self, width: int, heads: int):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(width, 3 * width)
    self.proj = nn.Linear(width, width)

  def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    batch, tokens, width = x.shape
    q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, T, d]
    q, k = rotate(q, *tables).to(v.dtype), rotate(k, *tables).to(v.dtype)
    y = F.scaled_dot_product_attention(q, k, v)
    return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
  def __init__(self, width: int, heads: int, hidden: int, drop_path: float):
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
    self.attn = Attention(width, heads)
    self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    self.ls1, self.ls2 = (nn.Parameter(torch.full((width,), 1e-5)) for _ in range(2))
    self.drop_path = drop_path

  def branch(self, x: Tensor, residual) -> Tensor:
    """Adds a residual branch, in training on a random subset of the rows only."""
    rows = x.shape[0]
    kept = max(int(rows * (1 - self.drop_path)), 1)
    if not self.training or kept == rows:
      return x + residual(x)
    chosen = torch.randperm(rows, device=x.device)[:kept]
    return torch.index_add(x, 0, chosen, residual(x[chosen]).to(x.dtype), alpha=rows / kept)

  def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    x = self.branch(x, lambda y: self.attn(self.norm1(y), tables) * self.ls1)
    return self.branch(x, lambda y: self.mlp(self.norm2(y)) * self.ls2)


class Backbone(nn.Module):
  """A ViT with class token, registers, and rotary positions."""

  def __init__(self, width: int, depth: int, heads: int, hidden: int, patch: int, registers: int, drop_path: float):
    super().__init__()
    self.patch, self.head_dim = patch, width // heads
    self.patch_embed = nn.Conv2d(3, width, patch, patch)
    self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02)
    self.registers = nn.Parameter(torch.randn(1, registers, width) * 0.02)
    self.mask_token = nn.Parameter(torch.zeros(width))
    self.blocks = nn.ModuleList(Block(width, heads, hidden, drop_path) for _ in range(depth))
    self.norm = nn.LayerNorm(width, eps=1e-5)

  def forward(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Class tokens [B, D] and patches [B, N, D]."""
    patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B, N, D]
    if masks is not None:
      patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
    batch = images.shape[0]
    x = torch.cat([self.cls.expand(batch, -1, -1), self.registers.expand(batch, -1, -1), patches], dim=1)
    for block in self.blocks:
      log_scale = torch.rand(1, device=x.device) * 2 - 1 if self.training else torch.zeros(1, device=x.device)
      x = block(x, rope_table(images.shape[-1] // self.patch, self.head_dim, 2.0**log_scale))
    x = self.norm(x)
    return x[:, 0], x[:, 1 + self.registers.shape[1] :]


class Head(nn.Module):
  def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int):
    super().__init__()
    self.mlp = nn.Sequential(
      nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
    )
    self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)

  def forward(self, x: Tensor) -> Tensor:
    return self.last_layer(F.normalize(self.mlp(x), dim=-1))


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
  """[N, K] -> [N, K]; rows sum to 1."""
  logits = logits.float() / temperature
  q = (logits - logits.max()).exp()
  q /= q.sum()
  for _ in range(iterations):
    q /= q.sum(dim=0, keepdim=True) * q.shape[1]
    q /= q.sum(dim=1, keepdim=True) * q.shape[0]
  return q * q.shape[0]


def dino_loss(student: Tensor, teacher: Tensor, *, ignore_diagonal: bool) -> Tensor:
  """Mean cross-entropy of [S, B, K] scores with [T, B, K] targets."""
  log_probs = F.log_softmax(student.float() / 0.1, dim=-1)
  loss = -torch.einsum("sbk,tbk->st", log_probs, teacher)
  pairs = loss.numel()
  if ignore_diagonal:
    loss, pairs = loss * (1 - torch.eye(*loss.shape, device=loss.device)), pairs - min(loss.shape)
  return loss.sum() / (student.shape[1] * pairs)


def koleo_loss(x: Tensor) -> Tensor:
  """[B, D] -> scalar."""
  x = F.normalize(x.float(), dim=-1, eps=1e-8)
  with torch.no_grad():
    similarity = x @ x.T
    nearest = similarity.fill_diagonal_(-1).argmax(dim=1)
  return -torch.log(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).mean()


class Step:
  """Student, teacher, optimizer and one batch; `run` does a step and returns the loss."""

  def __init__(self, s: dict):
    torch.manual_seed(0)
    self.s, self.device = s, torch.device(s["device"])
    make = lambda drop: nn.ModuleDict(  # noqa: E731
      {
        "backbone": Backbone(
          s["width"], s["depth"], s["num_heads"], s["mlp_hidden"], s["patch_size"], s["num_registers"], drop
        ),
        "dino_head": Head(s["width"], s["hidden"], s["bottleneck"], s["prototypes"]),
        "ibot_head": Head(s["width"], s["hidden"], s["bottleneck"], s["prototypes"]),
      }
    ).to(self.device)
    self.student, self.teacher = make(s["drop_path"]).train(), make(0.0).eval()
    self.teacher.load_state_dict(self.student.state_dict())
    self.teacher.requires_grad_(False)
    decayed = [p for p in self.student.parameters() if p.ndim > 1]
    others = [p for p in self.student.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.04}, {"params": others, "weight_decay": 0.0}]
    self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.999), fused=True)
    self.forward = self.losses
    if s["compile"]:
      self.forward = torch.compile(self.losses)
    self.batch = self.random_batch()

  def random_batch(self) -> tuple[Tensor, ...]:
    s = self.s
    images, tokens = s["batch_size"], (s["global_size"] // s["patch_size"]) ** 2
    generator = torch.Generator().manual_seed(0)
    draw = lambda crops, side: torch.randn(crops * images, 3, side, side, generator=generator)  # noqa: E731
    masks = torch.zeros(2 * images, tokens, dtype=torch.bool)
    for row in range(images):  # half of the crops, evenly spread ratios
      count = int(tokens * (0.1 + 0.4 * (row + 1) / images))
      masks[row, torch.randperm(tokens, generator=generator)[:count]] = True
    masks = masks[torch.randperm(2 * images, generator=generator)]
    weights = (1.0 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]
    indices = masks.flatten().nonzero().flatten()
    crops = draw(2, s["global_size"]), draw(s["local_number"], s["local_size"])
    return tuple(x.to(self.device) for x in (*crops, masks, indices, weights))

  def losses(
    self, global_crops: Tensor, local_crops: Tensor, masks: Tensor, indices: Tensor, weights: Tensor
  ) -> Tensor:
    s, images, student = self.s, self.s["batch_size"], self.student
    with torch.no_grad():
      cls, patches = self.teacher["backbone"](global_crops)
      cls_targets = sinkhorn_knopp(self.teacher["dino_head"](cls), 0.07).unflatten(0, (2, images))
      patch_targets = sinkhorn_knopp(self.teacher["ibot_head"](patches.flatten(0, 1)[indices]), 0.07)
    cls, patches = student["backbone"](global_crops, masks)
    local_cls, _ = student["backbone"](local_crops)
    logits = student["dino_head"](torch.cat([cls, local_cls]))
    global_logits, local_logits = logits.unflatten(0, (-1, images)).split([2, s["local_number"]])  # [C, B, K]
    patch_logits = student["ibot_head"](patches.flatten(0, 1)[indices])
    log_probs = F.log_softmax(patch_logits.float() / 0.1, dim=-1)
    ibot = -(torch.sum(patch_targets * log_probs, dim=-1) * weights).sum() / (2 * images)
    koleo = sum(koleo_loss(crop) for crop in cls.unflatten(0, (2, images))) / 2
    local_share = 2 * s["local_number"] / (2 + 2 * s["local_number"])
    dino = local_share * dino_loss(local_logits, cls_targets, ignore_diagonal=False)
    dino = dino + (1 - local_share) * dino_loss(global_logits, cls_targets, ignore_diagonal=True)
    return dino + ibot + 0.2 * koleo

  def run(self) -> Tensor:
    enabled = self.s["dtype"] == "bfloat16"
    with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
      loss = self.forward(*self.batch)
    loss.backward()
    for module in self.student.values():
      nn.utils.clip_grad_norm_(module.parameters(), 3.0)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
      torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - 0.994)
    return loss.detach()


def start(settings: dict) -> tuple[str, Callable[[], object]]:
  """For `torch_peer.py`."""
  return f"PyTorch {torch.__version__}{', compiled' * settings['compile']}", Step(settings).run
