//! `ovlctl label`: sets or removes labels of objects.

use std::collections::BTreeMap;

use ovl_control::{Action, Applied, Apply, Document, Request, ResourceQuery};
use serde_json::{Map, Value};

use super::{DryRun, ask_objects, key, parse_kind, parse_kind_and_name, print, stage_and_request};
use crate::context::{Context, write_out};
use crate::error::{Error, Result};
use crate::text::printable;

/// Arguments of `label`.
#[derive(Debug, clap::Args)]
pub(crate) struct LabelArgs {
    /// Kind, such as `svc`; or KIND/NAME
    kind: String,
    /// Names of the objects, then KEY=VALUE to set a label and KEY- to remove it
    #[arg(value_name = "NAME|KEY=VALUE|KEY-", required = true)]
    words: Vec<String>,
    /// Change labels that have another value
    #[arg(long)]
    overwrite: bool,
    /// The namespace [default: default]
    #[arg(short, long, value_name = "NS")]
    namespace: Option<String>,
    #[command(flatten)]
    dry_run: DryRun,
}

/// The changes of labels: a value to set, or `None` to remove the label.
type Changes = BTreeMap<String, Option<String>>;

/// Runs `ovlctl label`.
pub(crate) fn label(context: &Context, args: &LabelArgs) -> Result<()> {
    let (names, changes) = parse(&args.words)?;
    let targets = if args.kind.contains('/') {
        std::iter::once(&args.kind)
            .chain(&names)
            .map(|text| parse_kind_and_name(text))
            .collect::<Result<Vec<_>>>()?
    } else {
        let kind = parse_kind(&args.kind)?;
        names.into_iter().map(|name| (kind, name)).collect::<Vec<_>>()
    };
    if targets.is_empty() || changes.is_empty() {
        return Err(Error::Usage("give at least one object, and KEY=VALUE or KEY-".to_owned()));
    }
    let mut documents = Vec::new();
    for (kind, name) in targets {
        let target = key(kind, args.namespace.as_deref(), name);
        let (namespace, name) = (target.name.namespace.clone(), target.name.name.clone());
        let query = ResourceQuery { kind, namespace: Some(namespace), name: Some(name) };
        let object = ask_objects(context, query)?.pop();
        let object = object.ok_or_else(|| Error::Failed(format!("{target} not found")))?;
        let value = changed(object.manifest, &changes, args.overwrite)
            .map_err(|error| Error::Failed(format!("nothing was changed: {target}: {error}")))?;
        documents.push(Document { file: "label".to_owned(), line: 1, within: String::new(), value });
    }
    let dry_run = args.dry_run.is_set();
    let request = Request::Apply(Apply { dry_run, ..Apply::default() });
    let all = stage_and_request(context, documents, &request)?;
    if context.objects.is_some() || context.output != crate::args::Output::Table {
        return print(context, &all.objects, dry_run);
    }
    write_out(&all.objects.iter().map(|object| outcome(object, dry_run)).collect::<String>()).map(drop)
}

fn outcome(object: &Applied, dry_run: bool) -> String {
    let not = if object.action == Action::Unchanged { "not " } else { "" };
    let dry = if dry_run { " (dry run)" } else { "" };
    printable(&format!("{}/{} {not}labeled{dry}", object.kind.qualified(), object.name)) + "\n"
}

/// Splits words into names and changes.
fn parse(words: &[String]) -> Result<(Vec<String>, Changes)> {
    let (mut names, mut changes) = (Vec::new(), Changes::new());
    for word in words {
        let (key, value) = match (word.split_once('='), word.strip_suffix('-')) {
            (Some((key, value)), _) => (key, Some(value.to_owned())),
            (None, Some(key)) => (key, None),
            (None, None) => {
                names.push(word.clone());
                continue;
            }
        };
        if key.is_empty() || changes.insert(key.to_owned(), value).is_some() {
            return Err(Error::Usage(format!("'{word}': give each label once, as KEY=VALUE or KEY-")));
        }
    }
    Ok((names, changes))
}

/// Returns a manifest with changed labels.
fn changed(mut manifest: Value, changes: &Changes, overwrite: bool) -> std::result::Result<Value, String> {
    let metadata = manifest.get_mut("metadata").and_then(Value::as_object_mut);
    let metadata = metadata.ok_or("the manifest has no metadata")?;
    let labels = metadata.entry("labels").or_insert_with(|| Value::Object(Map::new()));
    let labels = labels.as_object_mut().ok_or("the labels are not an object")?;
    for (key, value) in changes {
        let Some(value) = value else {
            labels.remove(key);
            continue;
        };
        match labels.get(key) {
            Some(old) if old != value && !overwrite => {
                return Err(format!("label {key} already has the value {old}: use --overwrite to change it"));
            }
            _ => labels.insert(key.clone(), value.clone().into()),
        };
    }
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn labels_are_set_removed_and_not_overwritten_unasked() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let (names, changes) = parse(&words("web db app=web old- empty=")).unwrap();
        assert_eq!(names, ["web", "db"]);
        let labelled = |labels: Value| json!({ "metadata": { "name": "web", "labels": labels } });
        let after = labelled(json!({ "app": "web", "empty": "" }));
        assert_eq!(changed(json!({ "metadata": { "name": "web" } }), &changes, false), Ok(after.clone()));
        assert_eq!(
            changed(labelled(json!({ "app": "web", "old": "1" })), &changes, false),
            Ok(after.clone())
        );
        let other = labelled(json!({ "app": "db" }));
        assert!(changed(other.clone(), &changes, false).unwrap_err().contains("--overwrite"));
        assert_eq!(changed(other, &changes, true), Ok(after));
        for text in ["a=1 a=2", "=1", "-", "a=1 a-"] {
            assert!(parse(&words(text)).is_err(), "{text}");
        }
    }
}
