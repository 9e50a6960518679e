{{/* Configuration of the Envoy beside the router: envoy/static-override-host.yaml with this release's numbers. */}}
{{- define "warmroute.envoyConfig" -}}
{{- $sidecar := .Values.envoySidecar -}}
{{- $header := include "warmroute.selectionHeader" . -}}
{{- $isFullDuplex := eq .Values.config.selection.body_mode "full_duplex_streamed" -}}
{{- $isOriginalDst := eq .Values.config.selection.mode "original_dst" -}}
{{- /* The family in which the router listens as well. */ -}}
{{- $any := ternary "\"::\"" "0.0.0.0" (hasPrefix "[" .Values.config.listen.extproc) -}}
admin:
  address: { socket_address: { address: 127.0.0.1, port_value: 19000 } }

static_resources:
  listeners:
  - name: http
    address: { socket_address: { address: {{ $any }}, port_value: 10080, ipv4_compat: {{ hasPrefix "[" .Values.config.listen.extproc }} } }
    # config.limits.body_bytes: a larger body is answered 413.
    per_connection_buffer_limit_bytes: {{ int64 .Values.config.limits.body_bytes }}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: http
          codec_type: AUTO
          # Of HTTP/2 a stream's window is its buffer limit.
          http2_protocol_options:
            initial_stream_window_size: {{ include "warmroute.streamWindow" . }}
            initial_connection_window_size: {{ include "warmroute.connectionWindow" . }}
          stream_idle_timeout: {{ include "warmroute.envoyDuration" .Values.envoyGateway.clientTrafficPolicy.streamIdleTimeout }}
          request_headers_timeout: 10s
          use_remote_address: true
          early_header_mutation_extensions:
          - name: envoy.http.early_header_mutation.header_mutation
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation
              mutations:
              {{- range include "warmroute.routingHeaders" . | fromJsonArray }}
              - remove: {{ . }}
              {{- end }}
          http_filters:
          - name: envoy.filters.http.ext_proc
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
              stat_prefix: warmroute
              grpc_service:
                envoy_grpc: { cluster_name: ext_proc }
              failure_mode_allow: {{ .Values.envoyGateway.failOpen }}
              message_timeout: {{ include "warmroute.envoyDuration" .Values.config.envoy.message_timeout }}
              processing_mode:
                request_header_mode: SEND
                request_body_mode: {{ ternary "FULL_DUPLEX_STREAMED" "BUFFERED" $isFullDuplex }}
                request_trailer_mode: {{ ternary "SEND" "SKIP" $isFullDuplex }}
                response_header_mode: SEND
                response_body_mode: {{ ternary "FULL_DUPLEX_STREAMED" "NONE" $isFullDuplex }}
                response_trailer_mode: {{ ternary "SEND" "SKIP" $isFullDuplex }}
              response_attributes: [ upstream.address, upstream.request_attempt_count ]
              metadata_options:
                receiving_namespaces: { untyped: [ envoy.lb ] }
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
          route_config:
            name: routes
            virtual_hosts:
            - name: all
              domains: [ "*" ]
              routes:
              - match: { prefix: / }
                route:
                  cluster: engines
                  timeout: 0s
                  retry_policy:
                    retry_on: "connect-failure,refused-stream,reset-before-request,retriable-status-codes"
                    retriable_status_codes: {{ toJson .Values.envoyGateway.retries.statusCodes }}
                    num_retries: {{ .Values.envoyGateway.retries.number }}
  # For the kubelet, which does not reach the admin port.
  - name: ready
    address: { socket_address: { address: {{ $any }}, port_value: 10081, ipv4_compat: {{ hasPrefix "[" .Values.config.listen.extproc }} } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ready
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
          route_config:
            virtual_hosts:
            - name: ready
              domains: [ "*" ]
              routes:
              - match: { path: /ready }
                direct_response: { status: 200 }

  clusters:
  - name: engines
    connect_timeout: {{ include "warmroute.envoyDuration" .Values.envoyGateway.connectTimeout }}
    circuit_breakers: &circuit_breakers
      thresholds:
      - max_connections: {{ .Values.envoyGateway.circuitBreaker.maxRequests }}
        max_pending_requests: {{ .Values.envoyGateway.circuitBreaker.maxRequests }}
        max_requests: {{ .Values.envoyGateway.circuitBreaker.maxRequests }}
        max_retries: {{ .Values.envoyGateway.circuitBreaker.maxRetries }}
    {{- if $isOriginalDst }}
    type: ORIGINAL_DST
    lb_policy: CLUSTER_PROVIDED
    original_dst_lb_config:
      metadata_key: { key: envoy.lb, path: [ { key: {{ $header }} } ] }
    {{- else }}
    # Every address of the headless Service is an endpoint, of both families: whichever of them discovery lists has to be one.
    type: STRICT_DNS
    dns_lookup_family: ALL
    dns_refresh_rate: 2s
    load_balancing_policy:
      policies:
      - typed_extension_config:
          name: envoy.load_balancing_policies.override_host
          typed_config:
            "@type": type.googleapis.com/envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost
            override_host_sources:
            - header: {{ $header }}
            - metadata: { key: envoy.lb, path: [ { key: {{ $header }} } ] }
            fallback_policy:
              policies:
              - typed_extension_config:
                  name: envoy.load_balancing_policies.least_request
                  typed_config:
                    "@type": type.googleapis.com/envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest
    load_assignment:
      cluster_name: engines
      endpoints:
      - lb_endpoints:
        - endpoint: { address: { socket_address: { address: {{ $sidecar.engines.host | quote }}, port_value: {{ $sidecar.engines.port }} } } }
    {{- end }}
  - name: ext_proc
    type: STATIC
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config:
          http2_protocol_options: {}
    circuit_breakers: *circuit_breakers
    {{- if $isFullDuplex }}
    # In full duplex Envoy fails a request with a body open only if it knows beforehand that nobody is there.
    health_checks:
    - timeout: 3s
      interval: 1s
      no_traffic_interval: 1s
      unhealthy_threshold: 1
      healthy_threshold: 1
      grpc_health_check: {}
    common_lb_config: { healthy_panic_threshold: { value: 0 } }
    {{- end }}
    load_assignment:
      cluster_name: ext_proc
      endpoints:
      - lb_endpoints:
        - endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: 9002 } } }
{{- end -}}
