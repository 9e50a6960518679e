# The image of warmroute: one binary, its licences and its bill of materials; no shell, no root.
#
#   docker build --build-arg REVISION=$(git rev-parse HEAD) --build-arg CREATED=$(git log -1 --format=%cI) --tag warmroute:0.1.0 .
#
# Both base images can be pinned by digest with --build-arg, which whoever publishes the image should do.
ARG RUST_IMAGE=docker.io/library/rust:1.95.0-bookworm
# Same Debian release as the builder, hence the same glibc; it has libstdc++, which libzmq needs.
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${RUST_IMAGE} AS builder
# g++ compiles libzmq; the image has it, and cmake too, but a smaller base may not.
RUN command -v c++ >/dev/null || \
    { apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*; }
WORKDIR /build
COPY . .
# Time of the files in the image, in seconds since 1970; docker buildx takes it from the environment.
ARG SOURCE_DATE_EPOCH=0
RUN SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH} .ci/image-build /staging

FROM ${RUNTIME_IMAGE}
LABEL org.opencontainers.image.title="warmroute" \
      org.opencontainers.image.description="Envoy external processor that sends each LLM request to the vLLM endpoint whose KV cache is warm for it" \
      org.opencontainers.image.licenses="Apache-2.0"
# What only the build knows: where the source is, its version, its commit and that commit's time (RFC 3339).
ARG SOURCE=
ARG VERSION=0.1.0
ARG REVISION=
ARG CREATED=
LABEL org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
COPY --from=builder /staging/ /
# By number, so that Kubernetes can check runAsNonRoot.
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/warmroute"]
CMD ["serve", "--config", "/etc/warmroute/config.yaml"]
