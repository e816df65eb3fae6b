# The project with its CUDA build of torch:  docker build -t uae . && docker run --gpus all -it uae
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/uae
COPY pyproject.toml README.md ./
COPY uae uae
COPY callbacks callbacks
COPY configs configs
COPY benchmarks benchmarks
RUN pip install --no-cache-dir .
ENTRYPOINT ["python", "-m", "uae.cli"]
CMD ["fit", "--config", "configs/tiny.yaml"]
