{{/* Names, labels, the image, and where secrets lie. */}}

{{- define "manta.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name -}}
{{- end -}}
{{- end -}}

{{- define "manta.selectorLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: manta
{{- end -}}

{{- define "manta.labels" -}}
{{ include "manta.selectorLabels" . }}
app.kubernetes.io/name: manta
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of pods. KubeRay finds the head by the labels name and created-by that it gives itself, so these are not set. */}}
{{- define "manta.podLabels" -}}
{{ include "manta.selectorLabels" .root }}
app.kubernetes.io/component: {{ .role }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "manta.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "manta.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "manta.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* {secretName, secretKey} of a secret that is given by name, or as a string under `key` in the chart's own Secret. */}}
{{- define "manta.secretKeyRef" -}}
{{- if kindIs "string" .value -}}
name: {{ include "manta.fullname" .root }}
key: {{ .key }}
{{- else -}}
name: {{ .value.secretName }}
key: {{ .value.secretKey }}
{{- end -}}
{{- end -}}

{{- define "manta.claim" -}}
{{- .Values.cache.existingClaim | default (printf "%s-models" (include "manta.fullname" .)) -}}
{{- end -}}

{{/* What clients outside the cluster ask for. Not /metrics, which tells of everybody's requests, nor the probes' paths. */}}
{{- define "manta.publicPaths" -}}
[/v1, /tokenize, /detokenize, /tokenizer_info, /version, /health]
{{- end -}}

{{/* Codes of requests that failed by the server's doing, as clients are told them (serve/errors.py): what counts against the objective. */}}
{{- define "manta.failureCodes" -}}
draining|host_lost|internal_error|invalid_logits|not_ready|poisoned_request|unavailable
{{- end -}}
