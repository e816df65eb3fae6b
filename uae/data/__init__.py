"""Images for training and evaluation."""

from uae.data.module import ImageData, SceneData
from uae.data.photographs import ImageFolderData, PhotographData, StreamedData, TableData, WebDatasetData

__all__ = [
    "ImageData",
    "ImageFolderData",
    "PhotographData",
    "SceneData",
    "StreamedData",
    "TableData",
    "WebDatasetData",
]
