"""The entry point by which lmms-eval finds the model `vreflection`."""

from lmms_eval.models.registry_v2 import ModelManifest


MANIFEST = ModelManifest(model_id="vreflection", chat_class_path=f"{__package__}.model.VReflection")
