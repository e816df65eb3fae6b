"""Images for training and evaluation."""

from uae.data.module import ImageData, ImageFolderData, SceneData

__all__ = ["ImageData", "ImageFolderData", "SceneData"]
