"""transformers reads, writes and makes packed models: `import mmq_kernels`, then `from_pretrained` as ever.

::

    import mmq_kernels
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained("blip2-w4", device_map="cuda")      # a folder of ours
    model = AutoModelForImageTextToText.from_pretrained(                                     # a model of theirs
        "Salesforce/blip2-opt-2.7b", quantization_config=mmq_kernels.MMQConfig("all=rtn:4:g128"))
    model.save_pretrained("blip2-rtn4")

Imported while transformers itself is still being imported (see `mmq_kernels._when_imported`), so everything that needs
a model is imported when it is called for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "mmq"


class MMQConfig(QuantizationConfigMixin):
    """What `from_pretrained(..., quantization_config=...)` is to do, and what config.json says was done.

    Args:
        recipe: which layers, how many bits: the one-line form or a `Recipe`. Methods that need no calibration (rtn,
            uniform) can be used while loading; a folder that is already packed brings its own.
        fields: of config.json's `quantization_config`; see `mmq_kernels.checkpoint.format`.

    Raises:
        ValueError: for a recipe that is none, or fields that are unknown.
    """

    recipe: str

    def __init__(self, recipe: Any = "", **fields: Any) -> None:
        from mmq_kernels.checkpoint.format import Description, parse
        from mmq_kernels.quantize.recipe import Recipe

        self.quant_method: Any = METHOD
        if fields:
            described = parse({"quant_method": METHOD, "recipe": recipe} | fields, type(self).__name__)
        else:
            described = Description(recipe=str(Recipe.parse(recipe)), groups=[])
        self._take(described)

    def _take(self, description: Any) -> None:
        self.__dict__.update(description.model_dump())

    @property
    def description(self) -> Any:
        """The fields as a `mmq_kernels.checkpoint.format.Description`."""
        from mmq_kernels.checkpoint.format import parse

        return parse(self.to_dict(), type(self).__name__)


class MMQQuantizer(HfQuantizer):
    """Loads packed folders, and packs other ones once they are loaded.

    Raises:
        ValueError: for a recipe that needs calibration and a model that is not packed.
    """

    quantization_config: MMQConfig

    def __init__(self, quantization_config: MMQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized:
            return
        from mmq_kernels.quantize.recipe import CALIBRATED, Recipe

        if not quantization_config.recipe:
            raise ValueError("recipe must say what to quantize, got ''; for example MMQConfig('all=rtn:4:g128')")
        for rule in Recipe.parse(quantization_config.recipe).rules:
            if rule.method in CALIBRATED:
                raise ValueError(
                    f"{rule.method} needs calibration data, which from_pretrained has not ({rule}); use rtn here, or "
                    "`mmq quantize` or mmq_kernels.quantize_checkpoint and load the folder that it writes"
                )

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        places = device_map.values() if isinstance(device_map, dict) else ()
        if any(str(place) == "disk" for place in places):
            raise ValueError("device_map must not offload to 'disk': packed layers stay on the device that computes")

    def _process_model_before_weight_loading(
        self, model: Any, *args: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from mmq_kernels.checkpoint.pretrained import prepare

        if self.pre_quantized:
            prepare(model, self.quantization_config.description, checkpoint_files)

    def _process_model_after_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        from mmq_kernels.checkpoint.format import describe, stored_layers
        from mmq_kernels.checkpoint.pretrained import finish, hooks, put_back
        from mmq_kernels.models import quantize_model

        if self.pre_quantized:
            finish(model)
        else:
            found = hooks(model)
            quantize_model(model, self.quantization_config.recipe)
            put_back(model, found)
        self.quantization_config._take(describe(stored_layers(model), self.quantization_config.recipe))
        model.config.quantization_config = self.quantization_config
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from mmq_kernels.checkpoint.pretrained import densify

        densify(model, dtype)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None, "as stored", for the packed tensors; transformers 5 asks."""
        from mmq_kernels.nn.on_disk import ON_DISK

        names: Iterable[str] = getattr(converter, "source_patterns", ())
        own = any(name.endswith(ON_DISK) for name in names)
        return None if own else super().get_new_dtype(converter, param, dtype)

    def get_special_dtypes_update(self, model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Nothing: layers have their true dtypes. transformers 4 asks."""
        return {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make transformers know both, once."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(MMQConfig)
        register_quantizer(METHOD)(MMQQuantizer)


register()
