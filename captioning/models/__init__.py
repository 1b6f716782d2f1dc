"""The models: the captioner that is trained here, and LLaVA.

encoder            the frozen timm vision transformer and its preprocessing
captioner          encoder, projector, and GPT-2 with LoRA (`decoder.py`)
adapter            adapter files: read, rebuild the captioner, train further
step_functions     what search calls for each new token; compiled with fixed shapes
inference_weights  weights cast once, and reordered for oneDNN
export             a trained captioner as folders for use without this suite
llava              LLaVA 1.5 through transformers
"""

from captioning.models.adapter import load_captioner, read_adapter
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.llava import Llava, load_llava

__all__ = ["Captioner", "CaptionerConfig", "Llava", "load_captioner", "load_llava", "read_adapter"]
