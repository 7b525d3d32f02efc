# For processors: docker build --tag treepo-trl .
# For NVIDIA cards: docker build --build-arg GPU=yes --tag treepo-trl .
# Each RUN is a command of .ci/run; tests/packaging holds that. How to run it: docs/install.md.
FROM python:3.11-bookworm

ARG GPU=
WORKDIR /opt/treepo-trl
COPY . .
RUN make setup GPU="$GPU"

# What is downloaded lies in the mounted folder, and any user may run it. `docker run --gpus all` gives the cards.
ENV PATH="/opt/treepo-trl/.venv/bin:$PATH" \
    XDG_CACHE_HOME=/workspace/.cache \
    USER=treepo \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /workspace
ENTRYPOINT ["treepo-trl"]
