"""The Cog interface for making music: its inputs, and one call into `audiocraft`.

Cog reads this file without importing it. Every description is one literal on one line, every bound
and default a literal; anything cleverer is lost from the schema without a word.
"""

from cog import BaseRunner, Input, Path

from audiocraft.serving.prediction import PredictionRequest, PredictionService


class Predictor(BaseRunner):
    """Makes one piece of music per request."""

    def setup(self, weights: Path | str | None = None) -> None:
        """Prepares the model.

        Args:
            weights: fine-tuned weights to serve, from `COG_WEIGHTS`. Cog hands over the text of
                that variable as it stands, a path or a URL.
        """
        self.service = PredictionService(str(weights) if weights else None)

    def run(
        self,
        prompt: str | None = Input(
            default=None,
            description="What the music should sound like: genre, mood, instruments, tempo, key. For example: 90 bpm lo-fi hip hop with a warm Rhodes piano in C minor. Give a prompt, an input_audio or both.",
        ),
        input_audio: Path | None = Input(
            default=None,
            description="A recording to work from, in any common audio format. The new music follows its melody in the style of the prompt; with continuation switched on, the music goes on from where the recording ends.",
        ),
        duration: int = Input(
            default=8,
            description="Length of the result in seconds, from 1 to 600. In a continuation this counts the recording that is continued, too.",
        ),
        continuation: bool = Input(
            default=False,
            description="Switched on, the result opens with input_audio, of which at most 30 seconds (tiny: 12) can be used, and carries it on. Switched off, the result is new music that follows the melody of input_audio.",
        ),
        continuation_start: int = Input(
            default=0,
            ge=0,
            description="Where the part of input_audio that is used begins, in seconds from the start of the recording. Applies to a continuation and to a melody alike.",
        ),
        continuation_end: int | None = Input(
            default=None,
            description="Where the part of input_audio that is used ends, in seconds from the start of the recording. Left empty, or -1, it ends with the recording. Applies to a continuation and to a melody alike.",
        ),
        multi_band_diffusion: bool = Input(
            default=False,
            description="Turn the model's codes into sound with MultiBand Diffusion instead of its usual decoder. This can soften artefacts and takes longer. Works in mono and stereo, with every version but tiny.",
        ),
        normalization_strategy: str = Input(
            default="loudness",
            choices=["loudness", "clip", "peak", "rms"],
            description="How the level of the result is set. loudness: to an even perceived loudness of -14 LUFS. peak: so that the loudest moment lies 1 dB below full scale. rms: to an average level of -18 dB. clip: the level stays as it was made, and peaks above 1 dB below full scale are cut off.",
        ),
        top_k: int = Input(
            default=250,
            description="How many of the likeliest sounds the model chooses from at each step. Fewer sound safer and more repetitive, more sound freer. 0 lifts the limit.",
        ),
        top_p: float = Input(
            default=0.0,
            description="From 0 to 1. Above 0 it replaces top_k: at each step the model chooses from the likeliest sounds that together reach this probability. 0 leaves the choice to top_k.",
        ),
        temperature: float = Input(
            default=1.0,
            description="How adventurous the choices are. 1 is the model's own balance, less is more predictable, more is more surprising. 0 always takes the likeliest sound.",
        ),
        classifier_free_guidance: float = Input(
            default=3,
            description="How closely the music keeps to the prompt and the melody. More is more literal and less varied; 3 suits most music. 1 switches the guidance off, 0 ignores prompt and melody.",
        ),
        output_format: str = Input(
            default="wav",
            choices=["wav", "mp3", "flac", "ogg"],
            description="File format of the result. wav: uncompressed. flac: smaller with nothing lost. mp3 and ogg: much smaller, with some loss.",
        ),
        seed: int | None = Input(
            default=None,
            description="A number that fixes the choices: the same seed with the same inputs, on the same kind of machine, makes the same file again. Left empty, or -1, a new one is drawn and shown in the log.",
        ),
        replicate_weights: str | None = Input(
            default=None,
            description="Fine-tuned weights for this request only: the URL or path of the file that a training made. Left empty, the music is made by the fine-tuned weights that the server was started with, or else by model_version.",
        ),
        model_version: str = Input(
            default="stereo-melody",
            choices=[
                "small",
                "medium",
                "large",
                "melody",
                "melody-large",
                "stereo-small",
                "stereo-medium",
                "stereo-large",
                "stereo-melody",
                "stereo-melody-large",
                "tiny",
            ],
            description="The MusicGen model that plays. Larger ones sound richer and take longer; stereo ones fill left and right; only the melody ones and tiny can follow the melody of input_audio. tiny comes bundled, for a quick try. Fine-tuned weights that name the model they were made from override this choice.",
        ),
    ) -> Path:
        """Makes the music and returns its file.

        Cog passes a number as JSON has it (`8.0` for an integer, `3` for a float) and a plain path
        as a `str`; both get their types here.
        """
        result = self.service.predict(
            PredictionRequest(
                prompt=prompt,
                input_audio=None if input_audio is None else Path(input_audio),
                duration=int(duration),
                continuation=continuation,
                continuation_start=int(continuation_start),
                continuation_end=None if continuation_end is None else int(continuation_end),
                multi_band_diffusion=multi_band_diffusion,
                normalization_strategy=normalization_strategy,
                top_k=int(top_k),
                top_p=float(top_p),
                temperature=float(temperature),
                classifier_free_guidance=float(classifier_free_guidance),
                output_format=output_format,
                seed=None if seed is None else int(seed),
                replicate_weights=replicate_weights,
                model_version=model_version,
            )
        )
        for name, value in result.metrics.items():
            self.record_metric(name, value)
        return Path(result.path)
