"""The side of transformers, which has MusicGen as a model of its own."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.benchmark.shapes import (
    CODEC,
    DESCRIPTION,
    FRAME_RATE,
    GUIDANCE,
    TOP_K,
    Shape,
    read_config,
)
from tools.benchmark.side import Generate, Job, OnStep


def load(job: Job) -> Generate:
    """A function that makes music."""
    return generator(build_model(job), job)


def make_file(job: Job) -> None:
    """Load a model's folder and write a file of music."""
    from scipy.io import wavfile
    from transformers import MusicgenForConditionalGeneration

    model: Any = MusicgenForConditionalGeneration.from_pretrained(job.checkpoint)
    audio = generator(model, job)(job.seconds, lambda *_: None)
    wavfile.write(job.output, model.config.audio_encoder.sampling_rate, audio[0].cpu().numpy().T)


def save(job: Job) -> None:
    """Write the folder of a model with random weights, as it is published: in float32."""
    build_model(job).save_pretrained(job.checkpoint)


def generator(model: Any, job: Job) -> Generate:
    """A function that makes music with a model."""
    from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(Path(job.release) / "t5/tokenizer.json"),
        pad_token="<pad>",
    )
    max_delay = Shape.of(job.version, Path(job.shapes)).max_delay

    class Steps(StoppingCriteria):
        """Stops at nothing, but is called after each step."""

        def __init__(self, on_step: OnStep, total: int) -> None:
            self.done = 0
            self._on_step, self._total = on_step, total

        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            del scores
            self.done += 1
            self._on_step(self.done, self._total)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def generate(seconds: float, on_step: OnStep) -> Tensor:
        steps = int(seconds * FRAME_RATE) + max_delay
        inputs = tokenizer([DESCRIPTION] * job.batch, return_tensors="pt", padding=True)
        with torch.no_grad():
            audio: Tensor = model.generate(
                input_ids=inputs["input_ids"].to(job.device),
                attention_mask=inputs["attention_mask"].to(job.device),
                do_sample=True,
                guidance_scale=GUIDANCE,
                top_k=TOP_K,
                max_new_tokens=steps,
                stopping_criteria=StoppingCriteriaList([Steps(on_step, steps)]),
            )
        return audio

    return generate


def build_model(job: Job) -> Any:
    """A model with random weights of a version's shape, float32 on a CPU and float16 elsewhere."""
    import transformers

    shapes = Path(job.shapes)
    cfg = read_config(job.version, shapes)
    shape = Shape.of(job.version, shapes)
    stereo = cfg["channels"] == 2  # noqa: PLR2004
    kind = "MusicgenMelody" if shape.melody_frames else "Musicgen"
    decoder = getattr(transformers, f"{kind}DecoderConfig")(
        vocab_size=shape.card,
        hidden_size=shape.dim,
        ffn_dim=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=cfg["transformer_lm"]["num_heads"],
        num_codebooks=shape.codebooks,
        audio_channels=2 if stereo else 1,
        pad_token_id=shape.card,
        bos_token_id=shape.card,
        dropout=0.0,
    )
    text = transformers.T5Config.from_pretrained(Path(job.release) / "t5")
    config = getattr(transformers, f"{kind}Config")(
        text_encoder=text.to_dict(),
        audio_encoder=_codec(shapes).to_dict(),
        decoder=decoder.to_dict(),
    )
    dtype = torch.float32 if job.device == "cpu" else torch.float16
    with torch.device(job.device):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    settings = model.generation_config
    settings.decoder_start_token_id = settings.pad_token_id = settings.bos_token_id = shape.card
    return model.to(job.device, dtype).eval()


def _codec(shapes: Path) -> Any:
    """The configuration of the versions' codec."""
    from transformers import EncodecConfig

    cfg = read_config(CODEC, shapes)
    seanet, rvq = cfg["seanet"], cfg["rvq"]
    bits = rvq["n_q"] * math.log2(rvq["bins"])
    return EncodecConfig(
        target_bandwidths=[bits * FRAME_RATE / 1000],
        sampling_rate=cfg["sample_rate"],
        audio_channels=cfg["channels"],
        hidden_size=seanet["dimension"],
        num_filters=seanet["n_filters"],
        num_residual_layers=seanet["n_residual_layers"],
        upsampling_ratios=seanet["ratios"],
        num_lstm_layers=seanet["lstm"],
        kernel_size=seanet["kernel_size"],
        last_kernel_size=seanet["last_kernel_size"],
        residual_kernel_size=seanet["residual_kernel_size"],
        dilation_growth_rate=seanet["dilation_base"],
        compress=seanet["compress"],
        pad_mode=seanet["pad_mode"],
        use_causal_conv=seanet["causal"],
        use_conv_shortcut=not seanet["true_skip"],
        norm_type="weight_norm",
        codebook_size=rvq["bins"],
        codebook_dim=seanet["dimension"],
    )
