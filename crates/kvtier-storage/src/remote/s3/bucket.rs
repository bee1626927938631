//! What is asked of the server, request by request, and what its answers mean. The SDK signs, and tries again what failed in passing; each
//! call here ends when its caller's time does.

use std::ops::Range;
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Config, Region, RequestChecksumCalculation, ResponseChecksumValidation, SharedCredentialsProvider,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::list_object_versions::ListObjectVersionsOutput;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart, Delete, ObjectIdentifier};
use aws_smithy_http_client::tls;
use base64::prelude::{BASE64_STANDARD, Engine};
use kvtier_transfer::crc32c;
use tokio::task::JoinSet;

use super::S3Settings;
use super::credentials::FromFile;
use crate::remote::StoreError;
use crate::remote::store::readable;

/// What is put in parts is longer than this.
const PARTS_FROM: usize = 16 << 20;
/// Of one part; the last one may be shorter. Servers want at least 5 MiB.
const PART_BYTES: usize = 8 << 20;
/// Parts that are sent at once.
const PARTS_AT_ONCE: usize = 4;
/// Tries of one request, the first among them.
const TRIES: u32 = 3;
/// What one deletion may name.
const DELETED_AT_ONCE: usize = 1000;

/// A bucket of a server, and the part of it that is ours.
#[derive(Clone)]
pub(super) struct Bucket {
    client: Client,
    /// For messages.
    pub(super) name: String,
    bucket: String,
}

/// An object that a listing found.
pub(super) struct Listed {
    pub(super) key: String,
    pub(super) bytes: u64,
}

/// Of an object, every version that a server keeps.
struct Version {
    key: String,
    version: Option<String>,
}

impl Bucket {
    pub(super) fn new(settings: &S3Settings) -> Bucket {
        let tls = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::AwsLc);
        let http = aws_smithy_http_client::Builder::new().tls_provider(tls).build_https();
        let config = Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(settings.region.clone()))
            .credentials_provider(SharedCredentialsProvider::new(FromFile(settings.credentials.clone())))
            .force_path_style(settings.path_style)
            // What is not asked for by the protocol, servers of other makers do not know. Contents are sealed, and have sums of their own.
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .retry_config(
                RetryConfig::standard()
                    .with_max_attempts(TRIES)
                    .with_initial_backoff(Duration::from_millis(50)),
            )
            .timeout_config(TimeoutConfig::builder().connect_timeout(settings.timeout).build())
            .http_client(http);
        let config = match &settings.endpoint {
            Some(endpoint) => config.endpoint_url(endpoint),
            None => config,
        };
        let server = settings.endpoint.as_deref().unwrap_or("https://s3.amazonaws.com");
        Bucket {
            client: Client::from_conf(config.build()),
            name: format!("{}/{}", server.trim_end_matches('/'), settings.bucket),
            bucket: settings.bucket.clone(),
        }
    }

    /// The smallest trip that shows whether this node is let in.
    pub(super) async fn ping(&self) -> Result<(), StoreError> {
        let asked = self.client.head_bucket().bucket(&self.bucket).send().await;
        // An answer without a body: no words.
        match asked {
            Ok(_) => Ok(()),
            Err(error) => Err(self.trouble("HeadBucket", &error)),
        }
    }

    /// A page of what begins so, behind `after`; whether there is more.
    pub(super) async fn list(&self, prefix: &str, after: Option<String>) -> Result<(Vec<Listed>, bool), StoreError> {
        let asked = self.client.list_objects_v2().bucket(&self.bucket).prefix(prefix);
        let page = asked.set_start_after(after).send().await;
        let page = page.map_err(|error| self.trouble("ListObjectsV2", &error))?;
        let found = page.contents().iter().filter_map(|object| {
            Some(Listed {
                key: object.key()?.to_owned(),
                bytes: u64::try_from(object.size()?).ok()?,
            })
        });
        let found: Vec<Listed> = found.collect();
        if found.iter().any(|object| !object.key.starts_with(prefix)) {
            return Err(self.garbled("ListObjectsV2", "keys that were not asked for"));
        }
        let has_more = page.is_truncated().unwrap_or(false) && !found.is_empty();
        Ok((found, has_more))
    }

    /// Bytes of an object, in the pieces in which they came; `None` where there is no such object.
    pub(super) async fn get(&self, key: &str, range: Range<u64>) -> Result<Option<Vec<bytes::Bytes>>, StoreError> {
        let asked = self.client.get_object().bucket(&self.bucket).key(key);
        let asked = asked.range(format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
        let mut got = match asked.send().await {
            Ok(got) => got,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(self.trouble("GetObject", &error)),
        };
        let (mut pieces, mut bytes) = (Vec::new(), 0);
        while let Some(piece) = got.body.next().await {
            let piece = piece.map_err(|error| StoreError::Unavailable {
                server: self.name.clone(),
                reason: readable(&error.to_string()),
            })?;
            bytes += piece.len() as u64;
            if bytes > range.end - range.start {
                return Err(self.garbled("GetObject", "more than was asked for"));
            }
            pieces.push(piece);
        }
        Ok(Some(pieces))
    }

    /// Puts an object that is not there yet. One that is there under this key was put by an earlier try.
    pub(super) async fn put(&self, key: &str, object: bytes::Bytes) -> Result<(), StoreError> {
        if object.len() > PARTS_FROM {
            return self.put_in_parts(key, object).await;
        }
        let checksum = crc32c(&object).to_be_bytes();
        let put = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(key)
            .if_none_match("*")
            .checksum_crc32_c(BASE64_STANDARD.encode(checksum))
            .body(ByteStream::from(object))
            .send()
            .await;
        match put {
            Ok(_) => Ok(()),
            Err(error) if is_there(&error) => Ok(()),
            Err(error) => Err(self.trouble("PutObject", &error)),
        }
    }

    async fn put_in_parts(&self, key: &str, object: bytes::Bytes) -> Result<(), StoreError> {
        let begun = self.client.create_multipart_upload().bucket(&self.bucket).key(key);
        let begun = begun.send().await;
        let begun = begun.map_err(|error| self.trouble("CreateMultipartUpload", &error))?;
        let Some(upload) = begun.upload_id().map(str::to_owned) else {
            return Err(self.garbled("CreateMultipartUpload", "no upload"));
        };
        // Dropped halfway it is aborted by the next erasure, or by the bucket's own rule.
        let done = self.put_parts(key, &upload, object).await;
        if done.is_err() {
            self.abort(key, &upload).await?;
        }
        done
    }

    async fn put_parts(&self, key: &str, upload: &str, object: bytes::Bytes) -> Result<(), StoreError> {
        let (mut sending, mut parts) = (JoinSet::new(), Vec::new());
        for (number, from) in (1..).zip((0..object.len()).step_by(PART_BYTES)) {
            if sending.len() >= PARTS_AT_ONCE {
                parts.push(joined(&mut sending).await?);
            }
            let piece = object.slice(from..object.len().min(from + PART_BYTES));
            let (this, key, upload) = (self.clone(), key.to_owned(), upload.to_owned());
            sending.spawn(async move {
                let asked = this
                    .client
                    .upload_part()
                    .bucket(&this.bucket)
                    .key(key)
                    .upload_id(upload);
                let sent = asked.part_number(number).body(ByteStream::from(piece)).send().await;
                let sent = sent.map_err(|error| this.trouble("UploadPart", &error))?;
                Ok(CompletedPart::builder()
                    .part_number(number)
                    .set_e_tag(sent.e_tag().map(str::to_owned))
                    .build())
            });
        }
        while !sending.is_empty() {
            parts.push(joined(&mut sending).await?);
        }
        parts.sort_unstable_by_key(CompletedPart::part_number);
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let asked = self.client.complete_multipart_upload().bucket(&self.bucket).key(key);
        let asked = asked.upload_id(upload).multipart_upload(parts).if_none_match("*");
        match asked.send().await {
            Ok(_) => Ok(()),
            Err(error) if is_there(&error) => Ok(()),
            Err(error) => Err(self.trouble("CompleteMultipartUpload", &error)),
        }
    }

    async fn abort(&self, key: &str, upload: &str) -> Result<(), StoreError> {
        let asked = self.client.abort_multipart_upload().bucket(&self.bucket).key(key);
        match asked.upload_id(upload).send().await {
            Ok(_) => Ok(()),
            Err(error) if code_of(&error) == Some("NoSuchUpload") => Ok(()),
            Err(error) => Err(self.trouble("AbortMultipartUpload", &error)),
        }
    }

    /// Deletes objects; those that are not there are no error.
    pub(super) async fn delete(&self, keys: &[String]) -> Result<(), StoreError> {
        let version = |key: &String| Version {
            key: key.clone(),
            version: None,
        };
        self.delete_versions(keys.iter().map(version).collect()).await
    }

    async fn delete_versions(&self, versions: Vec<Version>) -> Result<(), StoreError> {
        for versions in versions.chunks(DELETED_AT_ONCE) {
            let object = |version: &Version| {
                ObjectIdentifier::builder()
                    .key(&version.key)
                    .set_version_id(version.version.clone())
                    .build()
                    .expect("it has a key")
            };
            let objects = versions.iter().map(object).collect();
            let delete = Delete::builder().set_objects(Some(objects)).quiet(true).build();
            let asked = self.client.delete_objects().bucket(&self.bucket);
            let deleted = asked.delete(delete.expect("it has objects")).send().await;
            let deleted = deleted.map_err(|error| self.trouble("DeleteObjects", &error))?;
            let kept = deleted.errors().iter().find(|error| error.code() != Some("NoSuchKey"));
            if let Some(kept) = kept {
                let (code, words) = (kept.code().unwrap_or("an error"), kept.message().unwrap_or_default());
                return Err(self.refused("DeleteObjects", &format!("{code} {words}")));
            }
        }
        Ok(())
    }

    /// Deletes all that begins so, in all its versions, and what was never completed, and looks again: how much was deleted, and how much a
    /// second look found.
    pub(super) async fn erase(&self, prefix: &str, deleted: &mut u64) -> Result<u64, StoreError> {
        while self.erase_page(prefix, deleted).await? {}
        let left = self.versions(prefix).await?.0.len() + self.uploads(prefix).await?.len();
        Ok(left as u64)
    }

    /// Whether there may be more.
    async fn erase_page(&self, prefix: &str, deleted: &mut u64) -> Result<bool, StoreError> {
        let uploads = self.uploads(prefix).await?;
        for (key, upload) in &uploads {
            self.abort(key, upload).await?;
        }
        let (versions, has_more) = self.versions(prefix).await?;
        let count = versions.len() as u64;
        self.delete_versions(versions).await?;
        *deleted += count + uploads.len() as u64;
        Ok(has_more || !uploads.is_empty())
    }

    /// The first page of what begins so: objects, versions of them, and marks of deletion, which say that something was there.
    async fn versions(&self, prefix: &str) -> Result<(Vec<Version>, bool), StoreError> {
        let asked = self.client.list_object_versions().bucket(&self.bucket).prefix(prefix);
        let page: ListObjectVersionsOutput = match asked.send().await {
            Ok(page) => page,
            // Whoever knows no versions has none.
            Err(error) if matches!(code_of(&error), Some("NotImplemented")) => {
                let (found, has_more) = self.list(prefix, None).await?;
                let version = |listed: Listed| Version {
                    key: listed.key,
                    version: None,
                };
                return Ok((found.into_iter().map(version).collect(), has_more));
            }
            Err(error) => return Err(self.trouble("ListObjectVersions", &error)),
        };
        let objects = page.versions().iter().map(|object| (object.key(), object.version_id()));
        let marks = page.delete_markers().iter().map(|mark| (mark.key(), mark.version_id()));
        let found = objects.chain(marks).filter_map(|(key, version)| {
            Some(Version {
                key: key?.to_owned(),
                version: version.map(str::to_owned),
            })
        });
        let found: Vec<Version> = found.collect();
        if found.iter().any(|version| !version.key.starts_with(prefix)) {
            return Err(self.garbled("ListObjectVersions", "keys that were not asked for"));
        }
        let has_more = page.is_truncated().unwrap_or(false) && !found.is_empty();
        Ok((found, has_more))
    }

    /// Uploads in parts that were begun and not completed: their bytes lie there, and no listing of objects has them.
    async fn uploads(&self, prefix: &str) -> Result<Vec<(String, String)>, StoreError> {
        let asked = self.client.list_multipart_uploads().bucket(&self.bucket).prefix(prefix);
        let page = match asked.send().await {
            Ok(page) => page,
            Err(error) if matches!(code_of(&error), Some("NotImplemented")) => return Ok(Vec::new()),
            Err(error) => return Err(self.trouble("ListMultipartUploads", &error)),
        };
        let uploads = page.uploads().iter();
        let uploads = uploads.filter_map(|upload| Some((upload.key()?.to_owned(), upload.upload_id()?.to_owned())));
        // Some servers do not heed the prefix.
        Ok(uploads.filter(|(key, _)| key.starts_with(prefix)).collect())
    }

    fn refused(&self, command: &'static str, reason: &str) -> StoreError {
        StoreError::Refused {
            server: self.name.clone(),
            command,
            reason: readable(reason),
        }
    }

    fn garbled(&self, command: &'static str, reason: &'static str) -> StoreError {
        StoreError::Garbled {
            server: self.name.clone(),
            command,
            reason,
        }
    }

    fn trouble<E>(&self, command: &'static str, error: &SdkError<E>) -> StoreError
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let unavailable = |reason: &str| StoreError::Unavailable {
            server: self.name.clone(),
            reason: readable(reason),
        };
        match error {
            SdkError::ServiceError(answer) => {
                let status = answer.raw().status().as_u16();
                // An answer to HEAD has no body, and the SDK gives it a name of its own.
                let code = answer.err().code().filter(|code| *code != "NotFound");
                let code = code.map_or_else(|| word_of(status), str::to_owned);
                let words = answer.err().message().unwrap_or_default();
                if status >= 500 || status == 429 {
                    unavailable(&format!("it answers {code} {words}"))
                } else {
                    self.refused(command, format!("{code} {words}").trim())
                }
            }
            SdkError::ConstructionFailure(_) => unavailable(&innermost(error)),
            SdkError::ResponseError(_) => self.garbled(command, "no answer of S3"),
            _ => unavailable(&innermost(error)),
        }
    }
}

async fn joined(sending: &mut JoinSet<Result<CompletedPart, StoreError>>) -> Result<CompletedPart, StoreError> {
    match sending.join_next().await {
        Some(Ok(done)) => done,
        _ => unreachable!("a part was under way, and tasks do not panic"),
    }
}

fn code_of<E: ProvideErrorMetadata>(error: &SdkError<E>) -> Option<&str> {
    match error {
        SdkError::ServiceError(answer) => answer.err().code(),
        _ => None,
    }
}

fn is_absent<E: ProvideErrorMetadata>(error: &SdkError<E>) -> bool {
    // Of an object that is shorter than it was: another, which is none of ours.
    matches!(code_of(error), Some("NoSuchKey" | "InvalidRange"))
}

fn is_there<E: ProvideErrorMetadata>(error: &SdkError<E>) -> bool {
    matches!(code_of(error), Some("PreconditionFailed"))
}

/// For answers without a body.
fn word_of(status: u16) -> String {
    match status {
        401 | 403 => "access denied".to_owned(),
        404 => "no such bucket".to_owned(),
        301 | 307 => "the bucket is in another region".to_owned(),
        other => format!("status {other}"),
    }
}

/// What lies at the bottom of an error: the words that say something.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
