//! The OpenAPI document says what the router does.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::admin::access::Role;
use crate::admin::guard::Access;
use crate::admin::routes::{DOCUMENT, routes};

const METHODS: [&str; 8] = ["get", "put", "post", "delete", "options", "head", "patch", "trace"];

fn document() -> Value {
    serde_json::from_str(DOCUMENT).unwrap()
}

fn operations(document: &Value) -> Vec<(String, String, &Value)> {
    let paths = document["paths"].as_object().unwrap();
    let mut found = Vec::new();
    for (path, item) in paths {
        for (method, operation) in item.as_object().unwrap() {
            assert!(METHODS.contains(&method.as_str()), "{path} has {method}");
            found.push((method.to_uppercase(), path.clone(), operation));
        }
    }
    found
}

#[test]
fn the_document_has_every_route_and_no_other_and_says_whom_each_answers() {
    let document = document();
    let documented: BTreeSet<(String, String)> = operations(&document)
        .into_iter()
        .map(|(method, path, _)| (method, path))
        .collect();
    let served: BTreeSet<(String, String)> = routes()
        .iter()
        .map(|route| (route.method.to_string(), route.path.to_string()))
        .collect();
    assert_eq!(documented, served);
    for route in routes() {
        let operation = &document["paths"][route.path][route.method.as_str().to_lowercase()];
        let (role, whole_node) = match route.access {
            Access::Anyone => ("anyone", false),
            Access::Token(role) => (role.word(), false),
            Access::WholeNode(role) => (role.word(), true),
        };
        assert_eq!(operation["x-role"], role, "{}", route.path);
        assert_eq!(operation["x-whole-node"] == true, whole_node, "{}", route.path);
        let open = operation["security"].as_array().is_some_and(Vec::is_empty);
        assert_eq!(open, route.access == Access::Anyone, "{}", route.path);
        // Who may look may not change.
        let changes = route.method != "GET";
        assert!(
            !changes || matches!(route.access, Access::Token(role) | Access::WholeNode(role) if role > Role::Read),
            "{} {}",
            route.method,
            route.path
        );
    }
}

#[test]
fn the_document_is_openapi_with_all_that_it_must_have() {
    let document = document();
    assert_eq!(document["openapi"], "3.1.0");
    assert!(document["info"]["title"].is_string() && document["info"]["version"].is_string());
    let mut ids = BTreeSet::new();
    for (method, path, operation) in operations(&document) {
        let here = format!("{method} {path}");
        assert!(
            ids.insert(operation["operationId"].as_str().unwrap()),
            "{here}: an id twice"
        );
        assert!(operation["summary"].is_string(), "{here}");
        let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
        let named: BTreeSet<&str> = parameters
            .iter()
            .filter(|parameter| parameter["in"] == "path")
            .map(|parameter| {
                assert_eq!(parameter["required"], true, "{here}");
                parameter["name"].as_str().unwrap()
            })
            .collect();
        let in_path: BTreeSet<&str> = path
            .split('/')
            .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
            .collect();
        assert_eq!(named, in_path, "{here}");
        let responses = operation["responses"].as_object().unwrap();
        assert!(responses.keys().any(|status| status.starts_with('2')), "{here}");
        for (status, response) in responses {
            assert!(
                status.parse::<u16>().is_ok_and(|status| (200..600).contains(&status)),
                "{here}"
            );
            let response = match response["$ref"].as_str() {
                Some(reference) => document
                    .pointer(&reference[1..])
                    .unwrap_or_else(|| panic!("{here}: {reference}")),
                None => response,
            };
            assert!(response["description"].is_string(), "{here} {status}");
        }
    }
}

#[test]
fn every_reference_leads_somewhere_and_every_schema_can_be_used() {
    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(members) => {
                found.extend(members.get("$ref").and_then(Value::as_str).map(str::to_string));
                members.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }
    let document = document();
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(found.len() > 50);
    for reference in &found {
        assert!(document.pointer(&reference[1..]).is_some(), "{reference}");
    }
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        assert!(
            found
                .iter()
                .any(|reference| reference == &format!("#/components/schemas/{name}")),
            "{name} is not used"
        );
        let mut schema = schema.clone();
        schema["components"] = document["components"].clone();
        let validator = jsonschema::validator_for(&schema).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(!validator.is_valid(&Value::from(17)), "{name} takes anything");
    }
}

#[test]
fn the_types_that_are_read_and_written_have_the_members_that_the_document_says() {
    use kvtier::purge::{NamespaceSettings, NamespaceStatus};
    let document = document();
    let members = |name: &str| -> BTreeSet<String> {
        let schema = &document["components"]["schemas"][name];
        schema["properties"].as_object().unwrap().keys().cloned().collect()
    };
    let keys = |value: Value| -> BTreeSet<String> { value.as_object().unwrap().keys().cloned().collect() };
    assert_eq!(
        members("Namespace"),
        keys(serde_json::to_value(NamespaceStatus::default()).unwrap())
    );
    assert_eq!(
        members("NamespaceSettings"),
        keys(serde_json::to_value(NamespaceSettings::default()).unwrap())
    );
}
