"""Which pixels each word of a caption looked at.

``attention`` has the table of methods and begins with the package's words; the methods are in ``by_attention``,
``by_activation``, ``by_probing`` and ``by_agreement``, and read a ``capture``; ``localisation`` chooses heads;
``explainers`` gets captures from LLaVA and from the captioner; ``grounding`` measures maps against boxes; ``pairs``
picks the best and the worst caption; ``figures`` draws PNGs and ``viewer`` an HTML page; ``saved`` keeps maps as files.
"""

from captioning.maps.attention import MapSpec
from captioning.maps.explainers import CaptionerExplainer, LlavaExplainer, explain

__all__ = ["CaptionerExplainer", "LlavaExplainer", "MapSpec", "explain"]
