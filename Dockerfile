# The project with the CUDA build of torch:
#   docker build -t uae . && docker run --gpus all --shm-size=8g -v uae_outputs:/uae/outputs uae fit --config tiny
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 uae && mkdir -p /uae/outputs && chown -R uae /uae
WORKDIR /src

# The libraries, which are several GB, are a layer of their own that only another pyproject.toml makes anew.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > libraries.txt \
    && pip install --no-cache-dir -r libraries.txt

COPY setup.py MANIFEST.in README.md LICENSE ./
COPY configs configs
COPY callbacks callbacks
COPY uae uae
RUN pip install --no-cache-dir --no-deps . && rm -rf build

USER uae
WORKDIR /uae
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["python", "-m", "uae.cli"]
CMD ["fit", "--config", "tiny"]
