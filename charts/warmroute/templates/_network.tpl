{{/* The labels by which the pods of a model are found, as JSON: it takes the discovery and the model's name. None where they are not
known here, or where a selector is more than equalities. */}}
{{- define "warmroute.engineLabels" -}}
{{- $kubernetes := index . 0 -}}
{{- $labels := dict -}}
{{- if $kubernetes.selector -}}
{{- if regexMatch "^\\s*[^=!,()\\s]+\\s*==?\\s*[^=!,()\\s]+\\s*(,\\s*[^=!,()\\s]+\\s*==?\\s*[^=!,()\\s]+\\s*)*$" $kubernetes.selector -}}
{{- range splitList "," $kubernetes.selector -}}
{{- $_ := set $labels (regexFind "^[^=]+" . | trim) (regexFind "[^=]+$" . | trim) -}}
{{- end -}}
{{- end -}}
{{- else if not (or $kubernetes.service $kubernetes.inference_pool) -}}
{{- $preset := default "aibrix" $kubernetes.preset -}}
{{- if eq $preset "aibrix" -}}{{- $_ := set $labels "model.aibrix.ai/name" (index . 1) -}}{{- end -}}
{{- if eq $preset "llm-d" -}}{{- $_ := set $labels "llm-d.ai/model" (index . 1) -}}{{- end -}}
{{- end -}}
{{- $labels | toJson -}}
{{- end -}}

{{/* The host of a ZMQ endpoint or of an address with a port, without brackets. */}}
{{- define "warmroute.hostOf" -}}
{{- trimPrefix "tcp://" . | regexFind "^.+:" | trimSuffix ":" | trimAll "[]" -}}
{{- end -}}

{{/* A NetworkPolicy peer for an IP address, as JSON; nothing for a name. */}}
{{- define "warmroute.peerOf" -}}
{{- if contains ":" . -}}
{{- dict "ipBlock" (dict "cidr" (printf "%s/128" .)) | toJson -}}
{{- else if regexMatch "^[0-9]+([.][0-9]+){3}$" . -}}
{{- dict "ipBlock" (dict "cidr" (printf "%s/32" .)) | toJson -}}
{{- end -}}
{{- end -}}

{{/* Egress rules to the engines: to all ports of their pods, or of their addresses, since pods have ports of their own (labels, annotations)
and engines tell theirs. Where only a name is known, it is the ports that are. */}}
{{- define "warmroute.engineEgress" -}}
{{- $policy := .Values.networkPolicy -}}
{{- $rules := list -}}
{{- range .Values.config.models -}}
{{- $discovery := .discovery -}}
{{- $name := .name -}}
{{- with $discovery.kubernetes -}}
{{- $namespaces := dict "matchLabels" (dict "kubernetes.io/metadata.name" (default $.Release.Namespace .namespace)) -}}
{{- $labels := $policy.enginePodLabels | default (include "warmroute.engineLabels" (list . $name) | fromJson) -}}
{{- $rules = append $rules (dict "to" (list (dict "namespaceSelector" $namespaces "podSelector" (dict "matchLabels" $labels)))) -}}
{{- end -}}
{{- with $discovery.dns -}}
{{- $ports := include "warmroute.eventPorts" . | fromJsonArray -}}
{{- if ne (default "a" .kind) "srv" -}}
{{- $ports = prepend $ports (dict "protocol" "TCP" "port" (default 8000 .port | int)) -}}
{{- end -}}
{{- $rules = append $rules (dict "ports" (uniq $ports)) -}}
{{- end -}}
{{- range $discovery.static -}}
{{- $host := include "warmroute.hostOf" .address -}}
{{- $rules = append $rules (dict "to" (list (include "warmroute.peerOf" $host | fromJson))) -}}
{{- $ranks := default 1 .ranks -}}
{{- range list .events .replay -}}
{{- if and . (hasPrefix "tcp://" .) (not (hasPrefix "tcp://*:" .)) (ne (include "warmroute.hostOf" .) $host) -}}
{{- $rule := dict "ports" (include "warmroute.rankPorts" (list (regexFind "[0-9]+$" . | int) $ranks) | fromJsonArray) -}}
{{- with include "warmroute.hostOf" . | include "warmroute.peerOf" -}}{{- $_ := set $rule "to" (list (fromJson .)) -}}{{- end -}}
{{- $rules = append $rules $rule -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with (.tokenizer).endpoint -}}
{{- $rules = append $rules (dict "ports" (list (dict "protocol" "TCP" "port" (include "warmroute.portOf" . | int)))) -}}
{{- end -}}
{{- end -}}
{{- with uniq $rules -}}{{- toYaml . -}}{{- end -}}
{{- end -}}

{{/* Ingress rules for engines that dial the router (`tcp://*:PORT`). */}}
{{- define "warmroute.engineIngress" -}}
{{- $rules := list -}}
{{- range .Values.config.models -}}
{{- range .discovery.static -}}
{{- $peer := include "warmroute.hostOf" .address | include "warmroute.peerOf" | fromJson -}}
{{- $ranks := default 1 .ranks -}}
{{- range list .events .replay -}}
{{- if and . (hasPrefix "tcp://*:" .) -}}
{{- $ports := include "warmroute.rankPorts" (list (regexFind "[0-9]+$" . | int) $ranks) | fromJsonArray -}}
{{- $rules = append $rules (dict "from" (list $peer) "ports" $ports) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with uniq $rules -}}{{- toYaml . -}}{{- end -}}
{{- end -}}

{{/* All TCP ports but those of the NetworkPolicy ports that it takes. */}}
{{- define "warmroute.otherPorts" -}}
{{- $starts := list -}}
{{- $ends := dict -}}
{{- range . -}}
{{- $start := printf "%05d" (int .port) -}}
{{- $starts = append $starts $start -}}
{{- $_ := set $ends $start (max (int .port) (default 0 .endPort | int) (get $ends $start | default 0 | int)) -}}
{{- end -}}
{{- $others := list -}}
{{- $next := 1 -}}
{{- range $starts | uniq | sortAlpha -}}
{{- $start := regexFind "[1-9][0-9]*$" . | int -}}
{{- if gt $start $next -}}
{{- $others = append $others (dict "protocol" "TCP" "port" $next "endPort" (sub $start 1)) -}}
{{- end -}}
{{- $next = max $next (add 1 (get $ends .)) -}}
{{- end -}}
{{- if le (int $next) 65535 -}}
{{- $others = append $others (dict "protocol" "TCP" "port" $next "endPort" 65535) -}}
{{- end -}}
{{- toYaml $others -}}
{{- end -}}
