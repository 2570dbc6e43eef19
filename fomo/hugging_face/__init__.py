"""Models of Hugging Face transformers: CLIPModel and SiglipModel, in and out.

names.py       the names of tensors, side by side
configs.py     config.json and open_clip_config.json, from one to the other
pictures.py    how pictures are prepared, from one to the other
folder.py      a model that transformers wrote, as open_clip has it
export.py      a model as transformers opens it; the only part that needs the library
"""
