"""The layer of sublayer steering."""

from ..post_block_steering.layer import PostBlockSteeringLayer
from ..steering.layer import SteeringLayer


class SublayerSteeringLayer(SteeringLayer):
    """The adapters at the sublayers of one block, `<block>.sublayer_steering`, of the same classes as in
    [`PostBlockSteeringLayer`]."""

    layer_name = "sublayer_steering"
    adapter_class = staticmethod(PostBlockSteeringLayer.adapter_class)
