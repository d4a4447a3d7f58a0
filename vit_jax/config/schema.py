"""The schema: every key of a configuration, with its default and its meaning.

`default()` is the schema: every key that exists, with its default and its meaning. A run file in `configs/` starts from
it, changes what the run needs and returns it from `get_config(arg)`; `--config.a.b=value` overrides come last.

Durations (`duration`, `warmup`, `every`, …) are strings: "1000 steps", "100 epochs", "2e6 examples", "10 %" (of the
run). A key whose default is `placeholder(type)` may stay None; its comment says what None means.
"""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def default() -> ConfigDict:
  """The schema: all keys with their defaults (a DINOv3 ViT-S/16 pretrained from scratch)."""
  c = ConfigDict()
  c.method = "dinov3"  # the training method: a file of vit_jax/methods
  c.seed = 0  # the one seed: initialisation, data order, crops, masks, drop path
  c.duration = "100 epochs"  # how long to train
  c.epoch_steps = placeholder(int)  # steps that make an "epoch" in durations; None: one pass over the data
  c.batch_size = 64  # images per step, over all devices and processes
  # Gradient accumulation: the student sees the batch in so many parts, one after the other, for the memory of one part
  # and the very same step: teacher targets, KoLeo and gradients are those of the whole batch. 1: no accumulation.
  c.micro_batches = 1
  # Images whose KoLeo neighbours, mask quota, drop-path subset and augmentation of positions are drawn together (the
  # reference: the batch of one GPU), whatever the number of devices. None: what a device has of a micro-batch when the
  # run begins, up to 64 images, else its largest divisor up to 64.
  c.loss_group_size = placeholder(int)

  # Folder where compiled programs are kept for the next start. None: "compilation_cache" in the workdir (or
  # JAX_COMPILATION_CACHE_DIR, where that is set); "off": they are not kept.
  c.compilation_cache = placeholder(str)

  # Parameters to start from: a run's folder or one of its steps (its teacher), or a weight file or folder as
  # vit_jax.load_model opens them. Student and teacher take from it the backbone, and the heads that it has and that are
  # of the same size; the log lists what came from where. None: random. A checkpoint in the workdir comes first.
  c.init_from = placeholder(str)
  c.init = ConfigDict()
  # Head warm-up: so long the backbone keeps its parameters (learning rate 0; Adam's moments go on) and the heads learn.
  c.init.freeze_backbone_steps = "0 steps"

  c.model = ConfigDict()
  # A name of vit_jax.models.zoo. The placeholders below override attributes of the named model; None keeps them.
  c.model.name = "dinov3_vits16"
  # Channels of the images; augment.mean and augment.std have as many entries (`vit-jax data scan` prints them). 3: RGB,
  # and 1: grey values, which all images have; with another number all images must have exactly so many (arrays in .npy,
  # TIFF of several bands).
  c.model.in_channels = 3
  for key in ("patch_size", "width", "depth", "num_heads", "mlp_hidden", "num_registers"):
    c.model[key] = placeholder(int)
  for key in ("mlp", "norm"):  # mlp: "gelu" | "gelu_tanh" | "swiglu"; norm: "layernorm" | "rmsnorm"
    c.model[key] = placeholder(str)
  # The feature of the image: "cls" (class token) | "avg" (mean of the patches) | "map" (attention pooling) |
  # "distilled" (mean of class token and first register). Without class token: "avg" or "map".
  c.model.pool = placeholder(str)
  c.model.pool_norm = placeholder(bool)  # the final norm is that of the pooled feature alone
  for key in ("layer_scale", "norm_eps", "init_std"):
    c.model[key] = placeholder(float)
  for key in ("qkv_bias", "proj_bias", "mlp_bias", "mask_k_bias", "patch_bias", "qk_norm", "pre_norm", "class_token"):
    c.model[key] = placeholder(bool)
  for key in ("separate_cls_norm", "separate_local_cls_norm"):
    c.model[key] = placeholder(bool)
  for key in ("depths", "widths"):  # of a ConvNeXt: blocks and channels of its stages
    c.model[key] = placeholder(tuple)
  # "rope" (rotary, see model.rope) | "learned" (a table, see model.position_table) | "sincos" (fixed) | "none"; None:
  # those of the named model.
  c.model.positions = placeholder(str)
  c.model.position_table = ConfigDict()  # learned positions; None keeps the named model's
  c.model.position_table.image_size = placeholder(int)  # side of the images that fit the table; others have it resized
  c.model.position_table.prefix = placeholder(str)  # tokens that have one besides patches: "none" | "cls" | "all"
  c.model.position_table.antialias = placeholder(bool)  # resize with antialiasing
  c.model.position_table.offset = placeholder(float)  # added to the new grid in the resizing: 0.1 in DINOv2
  c.model.rope = ConfigDict()  # rotary positions; None keeps the named model's
  for key in ("base", "min_period", "max_period", "shift", "jitter", "rescale"):
    c.model.rope[key] = placeholder(float)
  c.model.rope.normalize = placeholder(str)  # "separate" | "min" | "max"
  c.model.rope.dtype = placeholder(str)  # "float32" | "bfloat16" (the reference trains with bfloat16 tables)
  c.model.drop_path = 0.0  # share of the samples of a loss group that skip a residual branch (student only)
  c.model.dtype = "float32"  # compute: "float32" | "bfloat16"; parameters, optimizer and losses stay float32
  # 8 bits in which the linear maps of the blocks of a ViT are computed, of student and teachers: "fp8" (as in the 7B
  # runs that were published; fast on GPUs from compute capability 8.9 on) | "int8" (on TPUs from v5e on); None: none.
  c.model.quantization = placeholder(str)
  # What the backward pass recomputes instead of keeping it: "none" | "dots" (all but matrix products) | "attention"
  # (its weights; flash attention never keeps them) | "blocks" (everything but the inputs of the blocks) | "offload"
  # (the same, and these inputs wait in the host's memory).
  c.model.remat = "none"
  # Blocks per iteration of the scan over depth. All of them: no loop, and nothing is copied into arrays of all layers
  # for the backward pass; but compiling takes several times as long, and a CPU is slower so.
  c.model.unroll = 1

  c.dino = ConfigDict()
  c.dino.loss_weight = 1.0
  c.dino.prototypes = 65536
  c.dino.hidden = 2048
  c.dino.bottleneck = 256
  c.dino.num_layers = 3
  # How the teacher's scores become targets: "sinkhorn_knopp" (over all tokens of the batch) | "softmax" (of the scores
  # less their running mean, each token by itself).
  c.dino.centering = "sinkhorn_knopp"
  c.dino.center_momentum = 0.9  # of that running mean, with "softmax"
  c.dino.init_std = 0.02  # of the head's initial weights
  c.dino.ignore_diagonal = True  # leave out the pairs of one global crop with itself

  c.ibot = ConfigDict()
  c.ibot.loss_weight = 1.0
  c.ibot.prototypes = 65536
  c.ibot.hidden = 2048
  c.ibot.bottleneck = 256
  c.ibot.num_layers = 3
  c.ibot.centering = "sinkhorn_knopp"  # as dino.centering, of the masked patches
  c.ibot.center_momentum = 0.9
  c.ibot.init_std = 0.02
  c.ibot.mask_probability = 0.5  # share of the global crops that are masked
  c.ibot.mask_ratio = (0.1, 0.5)  # masked share of the patches of a masked crop: evenly spread over this range
  c.ibot.mask_shift = False  # roll every mask by a random offset

  c.losses = ConfigDict()
  # Student tokens of a device whose prototype scores are there at once, in DINO and in iBOT; changes memory, not
  # values. None: as many as have 33 million scores (128 MiB): 512 tokens with 65,536 prototypes.
  c.losses.chunk = placeholder(int)

  c.koleo = ConfigDict()
  c.koleo.loss_weight = 0.1
  c.koleo.topk = 1
  # Images among which neighbours are searched. None: those of a loss group or, where many devices make these small, of
  # several, up to 64.
  c.koleo.group_size = placeholder(int)

  c.distillation = ConfigDict()  # of method="distillation": a frozen teacher in place of the student's average
  # The teacher, with both heads: a run, one of its steps or students, or a .pth training export {"teacher": …}. A run
  # means its newest step, at the start of this run.
  c.distillation.teacher = placeholder(str)
  # Of the teacher's parameters, which no checkpoint repeats. None: taken when the run starts, checked when it resumes.
  c.distillation.fingerprint = placeholder(str)
  # "name=file.py[:arg]" for each of several students (a file's model, heads, losses, schedules and optimizer count;
  # the rest is common, see students.py); (): one student, described by this config itself.
  c.distillation.students = ()
  c.students = ConfigDict()  # their own keys by name, as read from their files: students.NAME.model.width, …

  c.gram = ConfigDict()  # Gram anchoring: patches keep the similarities that they have for an earlier teacher
  # Where the gram teacher comes from. "init": the backbone that the run starts from; a run, one of its steps, a weight
  # file: as in init_from; "ema": none of its own, the teacher of the same step; "teacher": none of its own, the frozen
  # teacher of a distillation. None: no anchoring before `load_at`.
  c.gram.source = placeholder(str)
  c.gram.load_at = placeholder(str)  # before this step the teacher is copied to the gram teacher; None: never
  c.gram.refresh = ConfigDict()  # later copies of the teacher, after the steps whose number is a multiple of `every`
  c.gram.refresh.first = placeholder(str)  # none before this step; None: from the start
  c.gram.refresh.every = placeholder(str)  # None: no refreshes
  c.gram.refresh.max = placeholder(int)  # how many; None: no limit
  c.gram.normalize = True  # L2-normalise the patch features
  c.gram.per_image = True  # one Gram matrix a crop; False: one over all the patches of a loss group
  c.gram.tokens = "all"  # patches compared: "all" | "masked" | "unmasked" (the last two with per_image=False)
  # Negative similarities set to 0: "both": those of either side; "teacher": the teacher's, and the student's where both
  # are negative; "teacher_only": the teacher's alone (what the reference's option computes). None: kept
  c.gram.remove_negative = placeholder(str)
  c.gram.resize = "bicubic"  # how larger feature maps come to the student's grid: "bicubic" | "bilinear"
  c.gram.antialias = False
  c.gram.stats = False  # log the loss of masked and of unmasked patches, too

  c.schedules = ConfigDict()
  # 2: warm-up without its end point, cosine with both (the 7B recipes); 1: warm-up with its end point, cosine without
  # (the ViT-L recipe). Each schedule rises linearly start -> peak over `warmup`, then follows a cosine peak -> end over
  # `cosine` (None: what is left) and stays at `end`.
  c.schedules.version = 2
  # Version 1: cosines (but of the teacher's temperature and the loss weights) that would take so much longer (0.25: a
  # quarter), cut at the end of the run and rescaled to arrive there at `end`. 0: whole cosines.
  c.schedules.truncate = 0.0

  def schedule(start: float, peak: float, end: float, warmup: str = "0 steps") -> ConfigDict:
    s = ConfigDict(dict(start=start, peak=peak, end=end, warmup=warmup))
    s.cosine = placeholder(str)
    return s

  c.schedules.lr = schedule(0.0, 1e-3, 1e-6, "10 %")
  c.schedules.weight_decay = schedule(0.04, 0.04, 0.4)
  c.schedules.momentum = schedule(0.992, 0.992, 1.0)
  c.schedules.teacher_temperature = schedule(0.04, 0.07, 0.07, "30 %")
  c.schedules.local_loss_weight = schedule(1.0, 1.0, 1.0)  # extra factor of the local DINO term
  c.schedules.gram_loss_weight = schedule(1.0, 1.0, 1.0)  # factor of the Gram term

  c.optim = ConfigDict()
  c.optim.b1 = 0.9
  c.optim.b2 = 0.999
  c.optim.eps = 1e-8
  c.optim.clip = 3.0  # gradient norm limit of each of backbone, dino_head, ibot_head; 0: no clipping
  c.optim.max_nonfinite = 3  # steps in a row with a NaN or an infinity, whose updates are skipped, that stop the run
  c.optim.lr_scaling = "sqrt_1024"  # lr x 4 sqrt(batch/1024) | "linear_256": x batch/256 | "none"
  c.optim.layerwise_decay = 0.9
  c.optim.patch_embed_lr = 0.2  # extra lr factor of the patch embedding
  c.optim.freeze_last_layer = "1 epochs"  # prototypes keep lr 0 for so long
  # Decay the scales of a ConvNeXt's stem and down-sampling norms, as the published ones were (by an oversight).
  c.optim.decay_downsample_norms = False

  c.crops = ConfigDict()
  c.crops.global_size = 224
  c.crops.global_scale = (0.32, 1.0)
  c.crops.local_size = 96
  c.crops.local_scale = (0.05, 0.32)
  c.crops.local_number = 8
  c.crops.local_inside_global = False  # cut the local crops out of the global ones (local_scale then means nothing)
  c.crops.flip = 0.5  # probability of a horizontal flip
  # For Gram anchoring: the global crops once more, the same regions at another size. None: no further crops.
  c.crops.gram_size = placeholder(int)
  c.crops.gram_distortions = False  # distort them as the global crops are; False: not at all
  # Several resolutions: rows (global, local, gram or 0, probability), one drawn for each step, as in
  # ((512, 112, 768, 0.5), (768, 112, 1152, 0.5)). (): the sizes above. global_size stays the size of evaluation and of
  # a learned position table.
  c.crops.resolutions = ()

  # Photometric; triples are (first global crop, second global crop, local crops). Saturation, hue and grayscale are for
  # RGB: with model.in_channels other than 1 and 3 they are not applied, whatever they are; all else is.
  c.augment = ConfigDict()
  c.augment.jitter = 0.8  # probability of colour jitter
  c.augment.brightness = 0.4
  c.augment.contrast = 0.4
  c.augment.saturation = 0.2
  c.augment.hue = 0.1
  c.augment.grayscale = 0.2
  c.augment.blur = (0.0, 0.9, 0.5)  # the probabilities with which the published weights were trained
  c.augment.blur_sigma = (0.1, 2.0)
  c.augment.solarize = (0.0, 0.2, 0.0)
  c.augment.share_color_jitter = False  # jitter and grayscale once, before the image is cropped, not for each crop
  c.augment.mean = (0.485, 0.456, 0.406)  # of each channel, for values from 0 to 1; stored with exported weights
  c.augment.std = (0.229, 0.224, 0.225)

  c.data = ConfigDict()
  # folder:/path | tfds:name/split | array_record:/glob | parquet:/glob | tar:/glob | embedded:name | synthetic:kind, or
  # several with weights: 0.7 folder:/a + 0.3 tar:/b/*.tar
  c.data.source = "embedded:textures"
  c.data.workers = -1  # decoding processes; 0: threads of this process; -1: chosen from the number of cores
  # Where crops are made: "device": in the training step, the host only decodes; "host": by the workers; "auto": on the
  # device if that is a GPU or TPU. Both make the same crops, up to rounding, so that a run may change over.
  c.data.augment = "auto"
  # Height and width of the images that the device receives, larger ones being shrunk to fit. None: so that no crop of
  # an image of usual shape has to be enlarged (576 x 576 for crops of 224 and 96 pixels).
  c.data.canvas = placeholder(tuple)
  # (low, high): the values that become 0 and 255 of images that do not have 8 bits, such as (0, 10000) for the
  # reflectances of satellites; those of 8 bits stay as they are. None: 0 to 65535 for 16 bits, 0 to 1 for floats;
  # integers of other types, and floats outside 0 to 1, are refused. `vit-jax data scan` prints the range to set.
  c.data.value_range = placeholder(tuple)
  # Bounds on one image, checked before memory is taken for it; what is beyond is unreadable. Decoding takes up to 20
  # bytes a pixel for a moment.
  c.data.max_pixels = 178_956_970  # height x width as stored (Pillow's own bound)
  c.data.max_file_bytes = 2**29  # of an encoded image: 512 MiB
  c.data.prefetch = 2  # batches kept ready on the device
  # Share of unreadable images above which the run stops; sets below 1,000 images may have as many as one of that size,
  # up to half of theirs.
  c.data.max_bad_fraction = 0.01
  c.data.timeout = 120.0  # seconds after which data that do not come are reported and asked for again; 0: never
  c.data.cache_dir = placeholder(str)  # embedded data and indices; None: $VIT_JAX_CACHE or ~/.cache/vit_jax

  # Devices along each axis; one may be -1: what is left. Images are spread over replica, data and fsdp; parameters,
  # teachers and optimizer state over fsdp (their width) and tensor (heads, hidden channels), prototypes over both.
  c.mesh = ConfigDict(dict(replica=1, data=-1, fsdp=1, tensor=1))
  # What fsdp spreads. 3: also the student's parameters, gathered layer by layer when they are used; 1: these are whole
  # on every device, teachers and optimizer state are spread: more memory, less traffic.
  c.mesh.zero = 3

  c.evaluation = ConfigDict()
  c.evaluation.every = "10 %"  # also at step 0 and at the end; "0 steps": never
  c.evaluation.tasks = ("knn",)  # of "knn", "linear"; needs labels
  c.evaluation.train_source = placeholder(str)  # None: the evaluation split of data.source where it has one
  c.evaluation.test_source = placeholder(str)
  c.evaluation.image_size = placeholder(int)  # None: crops.global_size
  # Side of the centre crop over the short side of the resized image. None: 1 where the images are of image_size, so
  # that they stay as they are, else 224 / 256; a run chooses when it begins.
  c.evaluation.crop_ratio = placeholder(float)
  c.evaluation.batch_size = 64
  c.evaluation.max_examples = 50_000  # images of each split that are used

  c.checkpoint = ConfigDict()
  c.checkpoint.every = "5 %"  # also at the end, and when the run is asked to stop
  c.checkpoint.minutes = placeholder(float)  # also when the last one is so long ago; None: by steps alone
  # Seconds after SIGTERM when the process ends though its state is not saved: a little less than what the scheduler
  # leaves. None: it ends when the state is saved.
  c.checkpoint.grace = placeholder(float)
  c.checkpoint.keep = 3  # newest steps kept
  c.checkpoint.keep_every = placeholder(str)  # steps kept for ever
  # The step that is best by this score of its evaluation is kept, too, and saved if it would not be: "knn/top1",
  # "linear/top1", …; of several students each its own, or one's, "NAME/knn/top1". None: top1 of the first of
  # evaluation.tasks; "off": none is kept.
  c.checkpoint.keep_best = placeholder(str)
  c.checkpoint.keep_best_mode = "max"  # which is best: "max" | "min"

  c.log = ConfigDict()
  c.log.every = 10  # steps between lines of metrics
  c.log.tensorboard = True
  c.log.pictures = True
  return c


def loss_group_size(config: ConfigDict, devices: int = 1) -> int:
  """Images of one loss group: `loss_group_size`, or where it is None as many as one of the devices has, if up to 64.

  Of more than 64 in a micro-batch of a device, it is their largest divisor up to 64.
  """
  if config.loss_group_size is not None:
    return config.loss_group_size
  share, rest = divmod(config.batch_size, config.micro_batches * devices)
  if rest:  # which is an error that others explain
    share = config.batch_size // config.micro_batches
  return max((size for size in range(1, min(share, 64) + 1) if share % size == 0), default=1)
