export const bitfit_hf = (model: ModelData): string[] => {
	const { base_model_name_or_path: base } = model.config?.peft ?? {};
	const autoClass = model.transformersInfo?.auto_model ?? "AutoModelForSequenceClassification";
	const snippets: string[] = [];
	if (model.pipeline_tag) {
		snippets.push(`# pip install bitfit-hf
import bitfit_hf
from transformers import pipeline

pipe = pipeline("${model.pipeline_tag}", model="${model.id}")`);
	}
	snippets.push(`# pip install bitfit-hf
from bitfit_hf import load_delta
from transformers import ${autoClass}

base = ${autoClass}.from_pretrained("${base ?? "fill-in-base-model"}")
model = load_delta(base, "${model.id}")`);
	return snippets;
};
