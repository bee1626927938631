use kvtier_core::Parent;

use super::{TraceError, TraceReader, TraceRequest, block_hash, write_trace};

fn read(text: &str) -> Vec<Result<TraceRequest, TraceError>> {
    TraceReader::new(text.as_bytes()).collect()
}

#[test]
fn a_line_of_the_published_schema_is_read() {
    let read = read("{\"timestamp\": 27, \"input_length\": 1025, \"output_length\": 4, \"hash_ids\": [0, 1, 7]}\n");
    let request = read[0].as_ref().expect("a request");
    assert_eq!(
        (request.timestamp_ms, request.input_tokens, request.output_tokens),
        (27, 1025, 4)
    );
    assert_eq!(request.hash_ids, [0, 1, 7]);
    assert_eq!([0, 1, 2, 3].map(|index| request.tokens_at(index)), [512, 512, 1, 0]);
    assert_eq!(request.parent_at(0), Parent::Root);
    assert_eq!(request.parent_at(2), Parent::Block(block_hash(1)));
}

#[test]
fn empty_lines_and_a_missing_last_newline_are_fine() {
    let line = "{\"timestamp\":0,\"input_length\":1,\"output_length\":1,\"hash_ids\":[5]}";
    let read = read(&format!("\n{line}\r\n\n{line}"));
    assert_eq!(read.len(), 2);
    assert!(read.iter().all(Result::is_ok));
}

#[test]
fn an_error_names_its_line_and_ends_the_reading() {
    let line = "{\"timestamp\":0,\"input_length\":1,\"output_length\":1,\"hash_ids\":[5]}";
    let read = read(&format!("{line}\n\n{{\"timestamp\": \"soon\"}}\n{line}\n"));
    assert_eq!(read.len(), 2);
    let error = read[1].as_ref().expect_err("the third line is wrong").to_string();
    assert!(error.starts_with("line 3: invalid type: string \"soon\""), "{error}");
    assert!(error.contains("column"), "{error}");
}

#[test]
fn a_missing_field_is_named() {
    let error = read("{\"timestamp\":0,\"input_length\":1,\"hash_ids\":[5]}")[0]
        .as_ref()
        .expect_err("no answer length")
        .to_string();
    assert!(error.contains("line 1: missing field `output_length`"), "{error}");
}

#[test]
fn a_prompt_longer_than_its_ids_is_refused() {
    let error = read("{\"timestamp\":0,\"input_length\":5000,\"output_length\":1,\"hash_ids\":[5]}")[0]
        .as_ref()
        .expect_err("too long")
        .to_string();
    assert!(error.contains("input_length 5000"), "{error}");
}

#[test]
fn bytes_that_are_no_text_are_an_error_and_no_panic() {
    let read: Vec<_> = TraceReader::new(&[0xff, 0xfe, b'\n', 0][..]).collect();
    assert!(matches!(read[0], Err(TraceError::Parse { line: 1, .. })));
    assert_eq!(read.len(), 1);
}

#[test]
fn what_is_written_reads_back_the_same() {
    let requests = [
        TraceRequest {
            timestamp_ms: 1,
            input_tokens: 600,
            output_tokens: 2,
            hash_ids: vec![u64::MAX, 3],
        },
        TraceRequest {
            timestamp_ms: 9,
            input_tokens: 0,
            output_tokens: 0,
            hash_ids: vec![],
        },
    ];
    let mut text = Vec::new();
    write_trace(&requests, &mut text).expect("a vector takes everything");
    let again: Vec<TraceRequest> = TraceReader::new(&text[..])
        .map(|request| request.expect("valid"))
        .collect();
    assert_eq!(again, requests);
}

#[test]
fn distinct_ids_have_distinct_hashes() {
    let hashes: std::collections::BTreeSet<_> = (0..10_000).map(block_hash).collect();
    assert_eq!(hashes.len(), 10_000);
}
