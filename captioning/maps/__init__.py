"""Which pixels each word of a caption looked at.

``attention`` turns weights into word maps and begins with the package's words; ``explainers`` gets the weights from
LLaVA and from the captioner; ``grounding`` measures maps against boxes; ``pairs`` picks the best and the worst caption;
``figures`` draws PNGs and ``viewer`` an HTML page; ``saved`` keeps maps as files.
"""

from captioning.maps.attention import MapSpec
from captioning.maps.explainers import CaptionerExplainer, LlavaExplainer, explain

__all__ = ["CaptionerExplainer", "LlavaExplainer", "MapSpec", "explain"]
