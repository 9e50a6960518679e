{{/* warmroute's configuration, and what the other objects take from it, so that nothing is said twice. */}}

{{- define "warmroute.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- if kindIs "invalid" $config.events.siblings -}}
{{- $sibling := printf "http://%s-headless.%s.svc:9090" (include "warmroute.fullname" .) .Release.Namespace -}}
{{- $_ := set $config.events "siblings" (list $sibling) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* The part of it that takes effect at a start; the rest is read again while the routers run. */}}
{{- define "warmroute.configAtStart" -}}
{{- $config := include "warmroute.config" . | fromYaml -}}
{{- $_ := unset $config "rollout" -}}
{{- $_ := unset $config.log "filter" -}}
{{- range $config.models -}}{{- $_ := unset . "rollout" -}}{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* The request header that names the endpoint, which is also the key of the metadata. */}}
{{- define "warmroute.selectionHeader" -}}
{{- $default := ternary "target-pod" "x-gateway-destination-endpoint" (eq .Values.config.selection.mode "original_dst") -}}
{{- default $default .Values.config.selection.header -}}
{{- end -}}

{{/* Headers that a client must not send, as a JSON list. */}}
{{- define "warmroute.routingHeaders" -}}
{{- list "x-gateway-destination-endpoint" "target-pod" (include "warmroute.selectionHeader" .) | uniq | toJson -}}
{{- end -}}

{{/* Window of an HTTP/2 stream in bytes, which is Envoy's buffer limit for the stream's body; no window is smaller than 64 KiB. */}}
{{- define "warmroute.streamWindow" -}}
{{- max 65536 (int64 .Values.config.limits.body_bytes) -}}
{{- end -}}

{{/* Window of an HTTP/2 connection in bytes: twice a stream's, so that one stream that is not read does not stop the others; HTTP/2 allows
2^31-1, and Envoy Gateway's own default is 1 MiB. */}}
{{- define "warmroute.connectionWindow" -}}
{{- min 2147483647 (max 1048576 (mul 2 (include "warmroute.streamWindow" . | int64))) -}}
{{- end -}}

{{/* What is watched, as JSON: namespace → list of API groups with their resources. */}}
{{- define "warmroute.watches" -}}
{{- $watches := dict -}}
{{- range .Values.config.models -}}
{{- with (.discovery).kubernetes -}}
{{- $namespace := default $.Release.Namespace .namespace -}}
{{- $resources := get $watches $namespace | default dict -}}
{{- if .service -}}
{{- $_ := set $resources "endpointslices" "discovery.k8s.io" -}}
{{- else -}}
{{- $_ := set $resources "pods" "" -}}
{{- end -}}
{{- if .inference_pool -}}{{- $_ := set $resources "inferencepools" "inference.networking.k8s.io" -}}{{- end -}}
{{- $_ := set $watches $namespace $resources -}}
{{- end -}}
{{- end -}}
{{- $watches | toJson -}}
{{- end -}}

{{/* Whether the router asks the API server: "true" or nothing. */}}
{{- define "warmroute.asksApiServer" -}}
{{- if ne (include "warmroute.watches" .) "{}" -}}true{{- end -}}
{{- end -}}

{{/* Ports of KV events of `base` on: a list of one NetworkPolicy port, as JSON. */}}
{{- define "warmroute.rankPorts" -}}
{{- $base := index . 0 | int -}}{{- $ranks := index . 1 | int -}}
{{- $port := dict "protocol" "TCP" "port" $base -}}
{{- if gt $ranks 1 -}}{{- $_ := set $port "endPort" (sub (add $base $ranks) 1) -}}{{- end -}}
{{- list $port | toJson -}}
{{- end -}}

{{/* Ports of KV events of the engines that `discovery.kubernetes` or `discovery.dns` finds, as a JSON list of NetworkPolicy ports. */}}
{{- define "warmroute.eventPorts" -}}
{{- $discovery := . -}}
{{- $ports := list -}}
{{- $ranks := default 1 $discovery.ranks -}}
{{- $ports = concat $ports (include "warmroute.rankPorts" (list (default 5557 $discovery.events_port) $ranks) | fromJsonArray) -}}
{{- $ports = concat $ports (include "warmroute.rankPorts" (list (default 5558 $discovery.replay_port) $ranks) | fromJsonArray) -}}
{{- $ports | toJson -}}
{{- end -}}

{{/* Seconds from SIGTERM on in which streams are served: those in which new ones are still taken, then the grace of the open ones. */}}
{{- define "warmroute.drainSeconds" -}}
{{- $shutdown := .Values.config.shutdown -}}
{{- add (include "warmroute.seconds" $shutdown.delay | int64) (include "warmroute.seconds" $shutdown.grace | int64) -}}
{{- end -}}

{{/* The pod's termination grace period in seconds: after the streams come snapshots, event threads, the admin port and spans (8 s together
at most), and two seconds of air. */}}
{{- define "warmroute.terminationGracePeriod" -}}
{{- add (include "warmroute.drainSeconds" . | int64) 10 -}}
{{- end -}}
