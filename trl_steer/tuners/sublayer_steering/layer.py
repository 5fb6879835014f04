"""The layer of sublayer steering."""

from ..post_block_steering.layer import PostBlockSteeringLayer
from ..steering.layer import SteeringLayer


class SublayerSteeringLayer(SteeringLayer):
    """The adapters at the sublayers of one block, `<block>.sublayer_steering`: those of post-block steering."""

    layer_name = "sublayer_steering"
    adapter_class = staticmethod(PostBlockSteeringLayer.adapter_class)
